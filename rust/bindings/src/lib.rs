//! `llama_gpu._core`: one file per room of the core, this one lists what is exported.

mod errors;
mod estimate;
mod explain;
mod gguf;
mod gpu;
mod ledger;
mod metadata;
mod placement;
mod plan;
mod question;

#[pyo3::pymodule(gil_used = false)]
mod _core {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::estimate::{PyDeviceMemory, PyMemoryEstimate, estimate};

    #[pymodule_export]
    use crate::explain::{PyAlternative, PyExplanation, explain};
    #[pymodule_export]
    use crate::gguf::{PyHeader, PyShard, PyTensor, read_header};
    #[pymodule_export]
    use crate::metadata::{PyMetadata, PyMetadataArray};

    #[pymodule_export]
    use crate::gpu::{PyGpu, PyGpuProcess, PyGpuSnapshot, PyMonitor, has_host_pids, snapshot_gpus};

    #[pymodule_export]
    use crate::ledger::{PyClaim, PyLease, PyLedger};
    #[pymodule_export]
    use crate::placement::{PyPlacedDevice, PyPlacement, PyPolicy, PyRunning, place};
    #[pymodule_export]
    use crate::plan::{PyPlan, PyWanted, plan};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        crate::metadata::register(module.py())?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
