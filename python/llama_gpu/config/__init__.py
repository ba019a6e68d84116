"""What the proxy is told: one frozen ``Config``, from a file, the environment and flags.

Later wins: defaults, configuration file, ``LLAMA_GPU_<SECTION>_<KEY>``, command line.
"""

from llama_gpu.config.load import environment_names, load_config
from llama_gpu.config.settings import (
    BuiltInStrategy,
    Config,
    DegradeStep,
    EngineSettings,
    GpuSettings,
    LogSettings,
    ModelOptions,
    ServerPoolSettings,
    ServerSettings,
)

__all__ = [
    "BuiltInStrategy",
    "Config",
    "DegradeStep",
    "EngineSettings",
    "GpuSettings",
    "LogSettings",
    "ModelOptions",
    "ServerPoolSettings",
    "ServerSettings",
    "environment_names",
    "load_config",
]
