//! The shaders and what the Rust side takes them to be, for checks that need no GPU.

use std::mem::offset_of;

pub use crate::backend::{Access, Feature, Kernel, Layout, without_aliases};
use crate::kernels::optimizer::Control;

/// Every kernel of the crate.
pub fn all() -> Vec<&'static Kernel> {
    crate::kernels::all()
}

/// The control words of the optimizers, which stay on the device.
pub fn control() -> Layout {
    Layout {
        name: "Control",
        size: size_of::<Control>(),
        fields: &[
            ("norm", offset_of!(Control, norm)),
            ("scale", offset_of!(Control, scale)),
            ("correction1", offset_of!(Control, correction1)),
            ("correction2", offset_of!(Control, correction2)),
            ("skip", offset_of!(Control, skip)),
            ("steps", offset_of!(Control, steps)),
            ("skipped", offset_of!(Control, skipped)),
            ("clipped", offset_of!(Control, clipped)),
            ("clipped_values", offset_of!(Control, clipped_values)),
            ("values_low", offset_of!(Control, values_low)),
            ("values_high", offset_of!(Control, values_high)),
            ("value_steps", offset_of!(Control, value_steps)),
            ("loss_scale", offset_of!(Control, loss_scale)),
            ("good_steps", offset_of!(Control, good_steps)),
        ],
    }
}
