//! Finding and starting the driver's library.

use std::ffi::OsString;
use std::path::PathBuf;

use nvml_wrapper::Nvml;

use super::failure::Failure;
use super::host::Host;

/// Names a library to load in place of the driver's.
pub const LIBRARY_VARIABLE: &str = "LLAMA_GPU_NVML_LIBRARY";

/// Where the driver's library is looked for, in order.
///
/// The linker's own search comes first. The plain `.so` is a development link that newer
/// drivers do not ship; WSL and NixOS keep the library outside the search path.
#[cfg(not(windows))]
const CANDIDATES: [&str; 5] = [
    "libnvidia-ml.so.1",
    "libnvidia-ml.so",
    "/usr/lib/wsl/lib/libnvidia-ml.so.1",
    "/run/opengl-driver/lib/libnvidia-ml.so.1",
    "/usr/local/nvidia/lib64/libnvidia-ml.so.1",
];
#[cfg(windows)]
const CANDIDATES: [&str; 2] = [
    "nvml.dll",
    r"C:\Program Files\NVIDIA Corporation\NVSMI\nvml.dll",
];

/// Which library to load: the driver's, wherever it is, or one that was named.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Library {
    /// The driver's own, from the usual places.
    #[default]
    Driver,
    /// This file and no other.
    Named(PathBuf),
}

impl Library {
    /// What the environment variable `LLAMA_GPU_NVML_LIBRARY` names, else the driver's.
    pub fn from_environment() -> Self {
        match std::env::var_os(LIBRARY_VARIABLE) {
            Some(path) if !path.is_empty() => Self::Named(path.into()),
            _ => Self::Driver,
        }
    }

    fn candidates(&self) -> Vec<OsString> {
        match self {
            Self::Driver => CANDIDATES.iter().map(OsString::from).collect(),
            Self::Named(path) => vec![path.clone().into()],
        }
    }

    /// Loads and starts NVML, or says in words why it cannot be.
    ///
    /// A candidate that loads but does not start (a CUDA toolkit's stub, a stray copy) does not
    /// hide a good one behind it. The refusal of a driver is told rather than "not found".
    pub(super) fn start(&self, host: &Host) -> Result<Nvml, String> {
        let mut telling: Option<(Failure, OsString)> = None;
        for candidate in self.candidates() {
            match Nvml::builder().lib_path(&candidate).init() {
                Ok(nvml) => return Ok(nvml),
                Err(error) => {
                    let failure = Failure::from(error);
                    let tells_more = telling.as_ref().is_none_or(|(known, _)| {
                        known.is_missing_library() && !failure.is_missing_library()
                    });
                    if tells_more {
                        telling = Some((failure, candidate));
                    }
                }
            }
        }
        let (failure, library) = telling.ok_or("no place to look for the NVIDIA driver library")?;
        let mut words =
            failure.starting(&library.to_string_lossy(), host.kernel_module().as_deref());
        if failure.is_missing_library() {
            words.push_str(match self {
                Self::Driver => "; if this machine has an NVIDIA GPU, install its driver",
                Self::Named(_) => "; it is named by LLAMA_GPU_NVML_LIBRARY",
            });
        }
        Err(words)
    }
}
