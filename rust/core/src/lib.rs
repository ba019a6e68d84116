//! The decision core of llama-gpu: pure values in, pure values out.
//!
//! ```text
//! gguf (header) -> model (facts) -> estimate -> placement <- gpu (snapshot)
//! ```
//!
//! Nothing here logs, reads a clock or knows of Python. The only I/O is reading
//! a header ([`gguf`]) and asking NVML ([`gpu`]).

pub mod estimate;
pub mod gguf;
pub mod gpu;
pub mod model;
pub mod placement;
