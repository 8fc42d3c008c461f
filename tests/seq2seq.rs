//! The task of the sequence-to-sequence example: its tests stand in the module itself.

#[path = "../examples/common/dates.rs"]
mod dates;
