//! Back-propagation through a sequence too long to keep: 100,000 steps through one LSTM in under 1 GiB.
//!
//! The loss is the mean square of what the layer says at every step against a target that it should have seen one step before.
//! Kept whole, gates and states of all steps would take about 5 GB; here the backward sweep computes each segment again.

use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Parser;
use gatefold::nn::{Input, LstmConfig, Module};
use gatefold::{Device, Rng, Tensor};

#[derive(Parser)]
#[command(about = "Back-propagation through a very long sequence in bounded memory")]
struct Args {
    /// The device, as `gatefold devices` names it [default: the best GPU, else the native CPU]
    #[arg(long)]
    device: Option<String>,
    #[arg(long, default_value_t = 100_000)]
    steps: usize,
    #[arg(long, default_value_t = 8)]
    batch: usize,
    #[arg(long, default_value_t = 256)]
    hidden: usize,
    /// The most that the run may hold, in MiB
    #[arg(long, default_value_t = 256)]
    budget: u64,
    /// Steps of gradient descent
    #[arg(long, default_value_t = 2)]
    updates: usize,
}

fn main() -> Result<()> {
    let Args { device, steps, batch, hidden, budget, updates } = Args::parse();
    let device = device.map_or_else(Device::new, |name| Device::by_name(&name))?;
    println!("device: {}", device.info());
    let mut rng = Rng::seed(0);
    let mut lstm = LstmConfig::new(1, hidden).init(&device, &mut rng)?;
    let mut optimizer = gatefold::optim::Optimizer::new(gatefold::optim::Sgd::new(1.0), lstm.params_mut())?;
    let numbers: Vec<f32> = (0..steps * batch).map(|_| rng.uniform(-1.0, 1.0)).collect();
    let x = Tensor::from_slice(&device, &numbers, [steps, batch, 1])?;

    let bptt = lstm.bptt_memory(budget << 20);
    let plan = bptt.plan(steps, batch)?;
    let whole = lstm.bptt_memory(u64::MAX).plan(steps, batch)?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!(
        "whole: {:.0} MiB; in {} segments of {} steps: {:.0} MiB predicted",
        mib(whole.peak_bytes),
        plan.segments,
        plan.segment,
        mib(plan.peak_bytes)
    );

    let (mut first, mut last) = (f64::NAN, f64::NAN);
    for update in 0..updates {
        device.reset_peak();
        let before = device.memory().held;
        let start = Instant::now();
        let mut loss = 0.0;
        // Every unit tells the input of the step before.
        let result = lstm.bptt_memory(budget << 20).run(&x, Input::new(), |range, y| {
            let scale = 1.0 / (steps * batch * hidden) as f32;
            let said = y.to_vec()?;
            let wanted =
                |line: usize| if range.start * batch + line < batch { 0.0 } else { numbers[range.start * batch + line - batch] };
            let off: Vec<f32> = said.iter().enumerate().map(|(at, y)| y - wanted(at / hidden)).collect();
            loss += off.iter().map(|off| f64::from(off * off)).sum::<f64>() * f64::from(scale);
            let dy: Vec<f32> = off.iter().map(|off| 2.0 * off * scale).collect();
            Tensor::from_slice(&device, &dy, y.shape())
        })?;
        optimizer.step()?;
        device.synchronize()?;
        drop(result);
        let peak = device.memory().peak - before;
        println!("update {update}: loss {loss:.5}, {:.1} s, {:.0} MiB at most", start.elapsed().as_secs_f64(), mib(peak));
        ensure!(peak <= budget << 20, "the run held {peak} bytes, more than the budget");
        (first, last) = (if update == 0 { loss } else { first }, loss);
    }
    ensure!(updates < 2 || last < first, "the loss did not fall: {first} to {last}");
    Ok(())
}
