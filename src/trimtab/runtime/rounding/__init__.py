"""Weights become few bits: scales, rounding, packing, and the Hessian that second-order methods want."""
