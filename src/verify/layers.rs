//! Recurrent layers against PyTorch's case files.

use super::case_file::CaseFile;
use super::{Comparison, Report};
use crate::device::Device;
use crate::error::Result;
use crate::nn::{
    Activation, Cell, CellState, Direction, GruConfig, Input, LstmConfig, Module, Recurrent, RecurrentConfig, RnnConfig,
};
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
    let (input, hidden) = (case.input, case.hidden);
    match (case.cell.as_str(), case.nonlinearity.as_str(), case.projection) {
        ("lstm", _, 0) => run(device, name, case, LstmConfig::new(input, hidden), tolerance),
        ("lstm", _, width) => run(device, name, case, LstmConfig::new(input, hidden).projection(width), tolerance),
        ("gru", ..) => run(device, name, case, GruConfig::new(input, hidden), tolerance),
        ("rnn", "relu", _) => run(device, name, case, RnnConfig::new(input, hidden).activation(Activation::Relu), tolerance),
        ("rnn", ..) => run(device, name, case, RnnConfig::new(input, hidden), tolerance),
        (cell, ..) => Ok(Report::unsupported(name, cell)),
    }
}

fn run<C: Cell>(
    device: &Device,
    name: &str,
    case: &CaseFile,
    config: RecurrentConfig<C>,
    tolerance: (f64, f64),
) -> Result<Report> {
    let (output, gradient) = (case.output_bound(tolerance.0), case.gradient_bound(tolerance.1));
    let direction = if case.bidirectional { Direction::Both } else { Direction::Forward };
    let layer: Recurrent<C> = config.layers(case.layers).direction(direction).bias(case.bias).init(device, &mut Rng::seed(0))?;
    for (parameter, param) in layer.params() {
        param.set(&case.tensor(&format!("param.{parameter}"))?.to_f32())?;
    }
    let tensor = |name: &str| -> Result<Tensor> {
        let tensor = case.tensor(name)?;
        Tensor::from_slice(device, &tensor.to_f32(), tensor.shape.clone())
    };
    let state = |part: &dyn Fn(&str) -> String| -> Result<C::Value> {
        let tensors = C::Value::NAMES.iter().map(|name| tensor(&part(name))).collect::<Result<Vec<_>>>()?;
        match C::Value::from_tensors(tensors) {
            Some(state) => Ok(state),
            None => unreachable!("one tensor for each name"),
        }
    };
    let lengths: Option<Vec<u32>> = case.lengths.as_ref().map(|lengths| lengths.iter().map(|length| *length as u32).collect());
    let lengths = lengths.map(|lengths| Lengths::from_slice(device, &lengths)).transpose()?;
    let x = tensor("x")?;
    let initial = state(&|name| format!("{name}0"))?;
    let input = lengths.as_ref().map_or(Input::new(), |lengths| Input::new().lengths(lengths)).state(&initial);

    let mut comparisons = Vec::new();
    let mut compare = |label: &str, computed: &Tensor, expected: &str, bound: f64| -> Result<()> {
        comparisons.push(Comparison::new(label, &computed.to_vec()?, &case.tensor(expected)?.values, bound));
        Ok(())
    };
    let (y, last) = layer.forward(&x, input)?;
    compare("infer.y", &y, "y", output)?;
    for (name, tensor) in C::Value::NAMES.iter().zip(last.tensors()) {
        compare(&format!("infer.{name}n"), tensor, &format!("{name}n"), output)?;
    }
    let (y, last, tape) = layer.forward_train(&x, input)?;
    compare("y", &y, "y", output)?;
    for (name, tensor) in C::Value::NAMES.iter().zip(last.tensors()) {
        compare(&format!("{name}n"), tensor, &format!("{name}n"), output)?;
    }
    let (dx, dstate) = layer.backward(tape, &tensor("dy")?, Some(&state(&|name| format!("d{name}n"))?))?;
    compare("grad.x", &dx, "grad.x", gradient)?;
    for (name, tensor) in C::Value::NAMES.iter().zip(dstate.tensors()) {
        let name = format!("grad.{name}0");
        compare(&name, tensor, &name, gradient)?;
    }
    for (parameter, param) in layer.params() {
        let name = format!("grad.param.{parameter}");
        compare(&name, param.grad(), &name, gradient)?;
    }
    Ok(Report::new(name, comparisons))
}
