"""Which models there are: folders of GGUF files in, named entries out.

A ``Catalog`` is a value: scanning again makes another one, and headers of files that did
not change are not read twice.
"""

from llama_gpu.catalog.scan import scan
from llama_gpu.catalog.values import Catalog, ModelEntry

__all__ = ["Catalog", "ModelEntry", "scan"]
