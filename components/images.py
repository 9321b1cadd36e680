"""The container images that the stages run in; a site sets its own when it compiles or submits."""

import os

from trimtab import __version__

#: The variable that names an image of a registry, for clusters.
VARIABLE = "TRIMTAB_IMAGE"
#: Everything that runs without a GPU; as it is built on this machine, where the variable names no other.
CPU = os.environ.get(VARIABLE, f"localhost/trimtab-cpu-python:{__version__}")
