"""The rooms: one a stage, each with its KFP face, its work, its methods, a README and metadata."""
