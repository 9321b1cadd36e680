"""A release: what it says of itself, how that is verified, and when it is due again.

| file | idea |
|---|---|
| `statement` | the signed statement of what was released and on which evidence |
| `judgement` | whether the stored evidence supports it, judged anew |
| `papers` | what travels with a model for other tools: `model_card`, `bom`, `build_provenance`, `model_signature` |
| `task_scores` | what the answers say of each task |
| `shelf` | listing, pulling and withdrawing |
| `packing` | as an OCI image or artifact, on disk or in a registry |
| `verification` | whether a release in a store still is what its statement says |
| `watch` | whether a service still answers as its release did |
| `rebuild` | what a release is made of now, beside what it was made of |
"""
