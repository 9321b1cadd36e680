"""Tensor code that the rooms share; needs the extra `trimtab[torch]`."""
