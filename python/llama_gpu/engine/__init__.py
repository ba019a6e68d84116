"""The llama.cpp that serves the models.

``find`` chooses one, ``spawn`` starts it so that it dies with us, and ``__main__``, ``arguments`` and
``embedded`` are the embedded one: llama.cpp's HTTP server from the ``xllamacpp`` package behind
llama-server's flags.
"""

from llama_gpu.engine.find import embedded_engine, find_engine, list_devices, llama_server_engine

__all__ = ["embedded_engine", "find_engine", "list_devices", "llama_server_engine"]
