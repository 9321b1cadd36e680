"""Deployment: the gate that lets nothing unproven through, and the release."""
