//! The elementary functions as a kernel of their own, so that they can be measured on an adapter.

use super::math::{self, Apart};
use super::{READ, READ_WRITE, grid};
use crate::backend::{Kernel, params};
use crate::device::Backend;
use crate::error::Result;
use crate::tensor::Tensor;

params! {
    /// The shader's uniform struct.
    Probe { count: u32, function: u32, }
}

pub(crate) static PROBE: Kernel = Kernel {
    name: "math_probe",
    source: concat!(include_str!("../../shaders/math_probe.wgsl"), include_str!("../../shaders/math.wgsl")),
    entry: "probe",
    params: Probe::LAYOUT,
    bindings: &[(1, READ), (2, READ_WRITE)],
    workgroup: 64,
    features: &[],
};

/// An elementary function, its CPU twin, and its value in f64.
pub(crate) struct Function {
    pub name: &'static str,
    pub native: fn(f32) -> f32,
    pub exact: fn(f64) -> f64,
}

/// In the order of the shader's `function`.
pub(crate) const FUNCTIONS: [Function; 4] = [
    Function { name: "exp", native: math::exp::<Apart>, exact: f64::exp },
    Function { name: "log", native: math::log, exact: f64::ln },
    Function { name: "tanh", native: math::tanh::<Apart>, exact: f64::tanh },
    Function { name: "sigmoid", native: math::sigmoid::<Apart>, exact: |x| 1.0 / (1.0 + (-x).exp()) },
];

/// `y[i] = f(x[i])` for `FUNCTIONS[function]`.
pub(crate) fn probe(function: usize, x: &Tensor) -> Result<Tensor> {
    let y = Tensor::uninitialized(x.device(), x.shape())?;
    match x.device().backend() {
        Backend::Native => {
            let (x, mut y) = (x.native::<f32>(), y.native_mut::<f32>());
            y.iter_mut().zip(x.iter()).for_each(|(y, x)| *y = (FUNCTIONS[function].native)(*x));
        }
        Backend::Gpu(gpu) => {
            let params = Probe { count: x.len() as u32, function: function as u32 };
            gpu.launch(&PROBE, &params, &[x.range(), y.range()], grid(x.len()))?;
        }
    }
    Ok(y)
}
