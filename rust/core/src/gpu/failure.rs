//! NVML's return codes, in words that say what to do.

use nvml_wrapper::error::NvmlError;

pub(super) const INVALID_ARGUMENT: u32 = 2;
pub(super) const NOT_SUPPORTED: u32 = 3;
pub(super) const NO_PERMISSION: u32 = 4;
pub(super) const INSUFFICIENT_SIZE: u32 = 7;
pub(super) const DRIVER_NOT_LOADED: u32 = 9;
pub(super) const FUNCTION_NOT_FOUND: u32 = 13;
pub(super) const GPU_IS_LOST: u32 = 15;
pub(super) const RESET_REQUIRED: u32 = 16;
pub(super) const LIB_RM_VERSION_MISMATCH: u32 = 18;
pub(super) const ARGUMENT_VERSION_MISMATCH: u32 = 25;
pub(super) const UNKNOWN: u32 = 999;

/// One NVML call that did not succeed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    /// NVML's return code; `None` when the call could not be made or its answer not be read.
    pub(super) code: Option<u32>,
    detail: String,
}

impl Failure {
    /// A failure of our own finding, such as a NULL handle returned with success.
    pub(super) fn found(code: u32, detail: &str) -> Self {
        Self {
            code: Some(code),
            detail: detail.to_owned(),
        }
    }

    pub(super) fn is(&self, codes: &[u32]) -> bool {
        self.code.is_some_and(|code| codes.contains(&code))
    }

    /// The library could not be opened at all, as against a driver that refused.
    pub(super) fn is_missing_library(&self) -> bool {
        self.code.is_none()
    }

    /// `NVML error 15, GPU_IS_LOST`, or what the loader said.
    pub(super) fn cause(&self) -> String {
        match self.code {
            None => self.detail.clone(),
            Some(code) => match code_name(code) {
                Some(name) => format!("NVML error {code}, {name}"),
                None => format!("NVML error {code}"),
            },
        }
    }

    /// Why NVML could not be started, with the next step.
    pub(super) fn starting(&self, library: &str, kernel_module: Option<&str>) -> String {
        let cause = self.cause();
        match self.code {
            None => format!("the NVIDIA driver library could not be loaded: {library}: {cause}"),
            Some(DRIVER_NOT_LOADED) => format!(
                "the NVIDIA kernel module is not loaded ({cause}): load it (modprobe nvidia), or install the driver"
            ),
            Some(LIB_RM_VERSION_MISMATCH) => format!(
                "the NVIDIA driver was updated under a running kernel module{} ({cause}): reload the module or reboot",
                kernel_module.map_or_else(String::new, |version| format!(" of version {version}"))
            ),
            Some(NO_PERMISSION) => format!(
                "this user may not use the NVIDIA driver ({cause}): give it access to /dev/nvidiactl and /dev/nvidia*"
            ),
            Some(UNKNOWN) => format!(
                "the NVIDIA driver does not work here ({cause}): if this is a container, its GPU devices were taken \
                 away (a `systemctl daemon-reload` on the host does that), so restart the container; else see dmesg"
            ),
            Some(FUNCTION_NOT_FOUND) => format!(
                "{library} is no NVIDIA driver library, or one too old: {}",
                self.detail
            ),
            Some(_) => format!("NVML in {library} does not start ({cause}): see dmesg"),
        }
    }

    /// Why one GPU cannot be used, with the next step.
    pub(super) fn losing(&self) -> String {
        let cause = self.cause();
        match self.code {
            Some(GPU_IS_LOST) => format!(
                "the GPU has fallen off the bus ({cause}): look for Xid 79 in dmesg; it needs a reset or a reboot"
            ),
            Some(RESET_REQUIRED) => {
                format!(
                    "the GPU needs a reset ({cause}): stop what runs on it, then nvidia-smi --gpu-reset"
                )
            }
            Some(NO_PERMISSION) => {
                format!(
                    "this user may not use the GPU ({cause}): give it access to its /dev/nvidia* device"
                )
            }
            Some(UNKNOWN) => format!(
                "the driver cannot use the GPU ({cause}): see dmesg; in a container, restart the container"
            ),
            _ => format!("the GPU cannot be used ({cause})"),
        }
    }
}

impl From<NvmlError> for Failure {
    fn from(error: NvmlError) -> Self {
        let detail = match &error {
            NvmlError::LibloadingError(loader) => loader.to_string(),
            other => other.to_string(),
        };
        let code = match error {
            NvmlError::FailedToLoadSymbol(_) => Some(FUNCTION_NOT_FOUND),
            NvmlError::Utf8Error(_)
            | NvmlError::NulError(_)
            | NvmlError::LibloadingError(_)
            | NvmlError::StringTooLong { .. }
            | NvmlError::IncorrectBits(_)
            | NvmlError::SetReleaseFailed
            | NvmlError::GetPciInfoFailed
            | NvmlError::PciInfoToCFailed => None,
            coded => Some(u32::from(coded)),
        };
        Self { code, detail }
    }
}

/// The name of a code in nvml.h (`nvmlReturn_t`), without its prefix.
fn code_name(code: u32) -> Option<&'static str> {
    const NAMES: [&str; 31] = [
        "SUCCESS",
        "UNINITIALIZED",
        "INVALID_ARGUMENT",
        "NOT_SUPPORTED",
        "NO_PERMISSION",
        "ALREADY_INITIALIZED",
        "NOT_FOUND",
        "INSUFFICIENT_SIZE",
        "INSUFFICIENT_POWER",
        "DRIVER_NOT_LOADED",
        "TIMEOUT",
        "IRQ_ISSUE",
        "LIBRARY_NOT_FOUND",
        "FUNCTION_NOT_FOUND",
        "CORRUPTED_INFOROM",
        "GPU_IS_LOST",
        "RESET_REQUIRED",
        "OPERATING_SYSTEM",
        "LIB_RM_VERSION_MISMATCH",
        "IN_USE",
        "MEMORY",
        "NO_DATA",
        "VGPU_ECC_NOT_SUPPORTED",
        "INSUFFICIENT_RESOURCES",
        "FREQ_NOT_SUPPORTED",
        "ARGUMENT_VERSION_MISMATCH",
        "DEPRECATED",
        "NOT_READY",
        "GPU_NOT_FOUND",
        "INVALID_STATE",
        "RESET_TYPE_NOT_SUPPORTED",
    ];
    if code == UNKNOWN {
        return Some("UNKNOWN");
    }
    NAMES.get(usize::try_from(code).ok()?).copied()
}
