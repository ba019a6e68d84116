//! (room: estimate)
