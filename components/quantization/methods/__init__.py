"""How numbers are found: channel scales, GPTQ, and the packed layers that a format asks for."""
