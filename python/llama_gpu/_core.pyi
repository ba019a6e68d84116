"""The Rust core of llama-gpu.

Values are frozen, comparable by value and picklable. Sizes are bytes. Functions that
read a file or ask the driver let go of the interpreter while they wait; the others
take microseconds and do not.
"""

__version__: str
"""The version of the package, as in its wheel."""
