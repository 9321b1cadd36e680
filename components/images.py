"""The container images that the stages run in; a site sets its own when it compiles or submits."""

import os

from trimtab import __version__

#: Everything that runs without a GPU. TRIMTAB_IMAGE names another one, for example of a private registry.
CPU = os.environ.get("TRIMTAB_IMAGE", f"localhost/trimtab-cpu-python:{__version__}")
