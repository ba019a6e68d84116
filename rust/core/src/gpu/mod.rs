//! (room: gpu)
