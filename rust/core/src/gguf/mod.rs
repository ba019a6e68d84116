//! (room: gguf)
