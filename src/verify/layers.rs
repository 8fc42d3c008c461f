//! Recurrent layers against PyTorch's case files.

use super::case_file::CaseFile;
use super::{Comparison, Report};
use crate::device::Device;
use crate::error::Result;
use crate::nn::{Direction, Input, LstmConfig, LstmState, Module};
use crate::rng::Rng;
use crate::tensor::{Lengths, Tensor};

/// Runs a case on `device`: forward without a tape, then forward and backward with one; outputs within `tolerance.0`,
/// gradients within `tolerance.1` of their tensor's largest magnitude, or ten times PyTorch's own float32 error.
///
/// # Errors
/// What the device reports; a file that lacks a tensor.
pub fn run_case(device: &Device, name: &str, case: &CaseFile, tolerance: (f64, f64)) -> Result<Report> {
    if let Err(what) = case.supported() {
        return Ok(Report::unsupported(name, what));
    }
    let (output, gradient) = (case.output_bound(tolerance.0), case.gradient_bound(tolerance.1));
    let direction = if case.bidirectional { Direction::Both } else { Direction::Forward };
    let lstm = LstmConfig::new(case.input, case.hidden)
        .layers(case.layers)
        .direction(direction)
        .bias(case.bias)
        .init(device, &mut Rng::seed(0))?;
    for (parameter, param) in lstm.params() {
        param.set(&case.tensor(&format!("param.{parameter}"))?.to_f32())?;
    }
    let tensor = |name: &str| -> Result<Tensor> {
        let tensor = case.tensor(name)?;
        Tensor::from_slice(device, &tensor.to_f32(), tensor.shape.clone())
    };
    let lengths: Option<Vec<u32>> = case.lengths.as_ref().map(|lengths| lengths.iter().map(|length| *length as u32).collect());
    let lengths = lengths.map(|lengths| Lengths::from_slice(device, &lengths)).transpose()?;
    let x = tensor("x")?;
    let state = LstmState { h: tensor("h0")?, c: tensor("c0")? };
    let input = lengths.as_ref().map_or(Input::new(), |lengths| Input::new().lengths(lengths)).state(&state);

    let mut comparisons = Vec::new();
    let mut compare = |label: &str, computed: &Tensor, expected: &str, bound: f64| -> Result<()> {
        comparisons.push(Comparison::new(label, &computed.to_vec()?, &case.tensor(expected)?.values, bound));
        Ok(())
    };
    let (y, last) = lstm.forward(&x, input)?;
    compare("infer.y", &y, "y", output)?;
    compare("infer.hn", &last.h, "hn", output)?;
    compare("infer.cn", &last.c, "cn", output)?;
    let (y, last, tape) = lstm.forward_train(&x, input)?;
    compare("y", &y, "y", output)?;
    compare("hn", &last.h, "hn", output)?;
    compare("cn", &last.c, "cn", output)?;
    let dstate = LstmState { h: tensor("dhn")?, c: tensor("dcn")? };
    let (dx, dstate) = lstm.backward(tape, &tensor("dy")?, Some(&dstate))?;
    compare("grad.x", &dx, "grad.x", gradient)?;
    compare("grad.h0", &dstate.h, "grad.h0", gradient)?;
    compare("grad.c0", &dstate.c, "grad.c0", gradient)?;
    for (parameter, param) in lstm.params() {
        let name = format!("grad.param.{parameter}");
        compare(&name, param.grad(), &name, gradient)?;
    }
    Ok(Report::new(name, comparisons))
}
