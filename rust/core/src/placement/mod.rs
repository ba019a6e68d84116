//! (room: placement)
