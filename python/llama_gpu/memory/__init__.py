"""What loads really took and what llama.cpp projected, remembered for the next decision.

``case`` says what decides a model's memory, ``record`` what is known of one case, ``store`` keeps
records in a file, ``best`` picks the best tier for ``estimate``, ``known`` for the proxy, and
``projection`` asks llama.cpp's dry run. Only the standard library is used, so that the base wheel
has all of it.
"""
