//! Steps of the optimizers.

use super::harness::{Cases, MANY, NAN, OUTPUT, TIGHT, normal, to_bits, wide};
use crate::error::Result;
use crate::kernels;
use crate::kernels::optimizer::{Arena, CONTROL_WORDS, Control, Optimizer};
use crate::rng::Rng;
use crate::tensor::Tensor;
use crate::verify::{Comparison, oracle};

pub(super) fn sgd(cases: &mut Cases<'_>) -> Result<()> {
    optimizer(cases, false)
}

pub(super) fn adamw(cases: &mut Cases<'_>) -> Result<()> {
    optimizer(cases, true)
}

/// Six steps in a row, of which the third has a gradient that is not finite: nothing changes but the count.
fn optimizer(cases: &mut Cases<'_>, adam: bool) -> Result<()> {
    let mut rng = Rng::seed(9);
    for (count, max_norm, max_value, bad, momentum, decay, loss_scale, growth_interval) in [
        (1, 0.0, 0.0, NAN, 0.0, 0.0, 0.0, 0),
        (63, 0.0, 0.0, f32::INFINITY, 0.9, 0.0, 0.0, 0),
        (64, 1.0, 0.0, NAN, 0.5, 0.01, 0.0, 0),
        (65, 0.5, 0.0, f32::NEG_INFINITY, 0.9, 0.1, 0.0, 0),
        // Finite, but its square is not.
        (5000, 1e6, 0.0, 1e30, 0.9, 0.01, 0.0, 0),
        (5001, 2.0, 0.0, NAN, 0.0, 0.0, 0.0, 0),
        (200, 0.0, 0.5, NAN, 0.9, 0.01, 0.0, 0),
        // Both: without scaling first, other elements would be clipped.
        (5001, 20.0, 0.25, f32::INFINITY, 0.5, 0.01, 0.0, 0),
        (MANY, 0.0, 1.5, NAN, 0.9, 0.01, 0.0, 0),
        // Scaled: grows after two steps, halves at the third, grows after five.
        (65, 0.0, 0.0, f32::INFINITY, 0.9, 0.01, 1024.0, 2),
        (5001, 20.0, 0.25, NAN, 0.5, 0.01, 65_536.0, 2),
        // At its bounds: no more than 2^24, no less than 1.
        (66, 1.0, 0.0, NAN, 0.9, 0.0, 8_388_608.0, 1),
        (66, 1.0, 0.0, NAN, 0.9, 0.0, 1.0, 1000),
    ] {
        let (beta1, beta2) = (0.9, 0.999);
        let params = Optimizer {
            count: count as u32,
            learning_rate: 0.01,
            weight_decay: decay,
            max_norm,
            momentum: if adam { 0.0 } else { momentum },
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            epsilon: 1e-8,
            max_value,
            loss_scale,
            growth_interval,
        };
        let steps = if count == MANY { 2 } else { 6 };
        let start = normal(&mut rng, count);
        let gradients: Vec<Vec<f32>> = (0..steps)
            .map(|step| {
                // The last ones are small: where there is a norm to clip to, some are clipped and some are not.
                let size = if step < 4 { 1.0 } else { 1e-3 };
                let mut gradient: Vec<f32> = normal(&mut rng, count).into_iter().map(|g| size * g).collect();
                if step == 2 {
                    gradient[count - 1] = bad;
                }
                gradient
            })
            .collect();
        let [lr, weight_decay] = [params.learning_rate, params.weight_decay].map(f64::from);
        let by_sgd = oracle::Sgd { lr, momentum: params.momentum.into(), weight_decay };
        let by_adamw = oracle::AdamW { lr, beta1, beta2, epsilon: params.epsilon.into(), weight_decay };
        let scaled = format!("scaled by {loss_scale}, growing after {growth_interval}");
        cases.run(format!("{count}, clipped to {max_norm} and {max_value}, skipped at {bad}, {scaled}"), |run| {
            let zeros = || Tensor::zeros(run.device, [count]);
            let (value, first, gradient) = (Tensor::from_slice(run.device, &start, [count])?, zeros()?, zeros()?);
            let second = if adam { Some(zeros()?) } else { None };
            let control = Tensor::zeros(run.device, [CONTROL_WORDS])?;
            // As after many steps: the count is about to need its second word.
            let mut values = u64::from(u32::MAX);
            let counted = Control { values_low: u32::MAX, ..bytemuck::Zeroable::zeroed() };
            control.write(&[counted])?;
            let (mut w, mut m, mut v) = (wide(&start), vec![0.0; count], vec![0.0; count]);
            let (mut applied, mut skipped, mut clipped) = (0, 0, 0);
            let mut value_steps = 0;
            let (mut scale, mut good) = (if loss_scale > 0.0 { loss_scale } else { 1.0 }, 0);
            for (step, given) in gradients.iter().enumerate() {
                let dy = run.input("dy", given, [count])?;
                let scaled = match loss_scale > 0.0 {
                    true => kernels::optimizer::scale_loss(&params, &control, &dy)?,
                    false => dy,
                };
                if given.iter().all(|g| g.is_finite()) {
                    let expected: Vec<f32> = given.iter().map(|g| g * scale).collect();
                    run.bits(&format!("scaled gradient {step}"), &scaled, &to_bits(&expected))?;
                }
                gradient.copy_from(&scaled)?;
                let state = |tensors: [Option<&Tensor>; 3]| -> Result<Vec<u32>> {
                    let parts: Result<Vec<Vec<u32>>> = tensors.into_iter().flatten().map(Tensor::read_back).collect();
                    Ok(parts?.concat())
                };
                let tensors = [Some(&value), Some(&first), second.as_ref()];
                let before = state(tensors)?;
                let arena =
                    Arena { control: &control, value: &value, gradient: &gradient, first: &first, second: second.as_ref() };
                kernels::optimizer::step(&params, &arena)?;
                run.bits(&format!("gradient after step {step}"), &gradient, &vec![0; count])?;
                let words = run.read(&control)?;
                let now: Control = *bytemuck::from_bytes(bytemuck::cast_slice(&words));
                let norm = oracle::global_norm(&[&wide(given)]);
                let finite = norm.is_finite() && norm < 1e19;
                if finite {
                    let factor = if max_norm > 0.0 { oracle::clip_factor(norm, max_norm.into()) } else { 1.0 };
                    applied += 1;
                    clipped += u32::from(factor < 1.0);
                    let mut g: Vec<f64> = given.iter().map(|g| f64::from(*g) * factor).collect();
                    if max_value > 0.0 {
                        let limit = f64::from(max_value);
                        let outside = g.iter().filter(|g| g.abs() > limit).count() as u64;
                        (values, value_steps) = (values + outside, value_steps + u32::from(outside > 0));
                        g.iter_mut().for_each(|g| *g = g.clamp(-limit, limit));
                    }
                    match adam {
                        true => by_adamw.step(&mut w, &g, &mut m, &mut v, applied as i32),
                        false => by_sgd.step(&mut w, &g, &mut m),
                    }
                    let numbers = [now.norm, now.scale * scale];
                    run.comparisons.push(Comparison::new(format!("norm {step}"), &numbers[..1], &[norm], OUTPUT));
                    run.comparisons.push(Comparison::new(format!("scale {step}"), &numbers[1..], &[factor], OUTPUT));
                } else {
                    skipped += 1;
                    run.comparisons.push(Comparison::bits("all but the count, skipped", &state(tensors)?, &before));
                }
                if loss_scale > 0.0 {
                    good = if finite { good + 1 } else { 0 };
                    scale = match good == growth_interval {
                        true => (scale * 2.0).min(16_777_216.0),
                        false if finite => scale,
                        false => (scale / 2.0).max(1.0),
                    };
                    good %= growth_interval;
                }
                let kept = if loss_scale > 0.0 { scale } else { 0.0 };
                run.comparisons.push(Comparison::bits(format!("scale {step}"), &[now.loss_scale.to_bits()], &[kept.to_bits()]));
                let counts = [now.skip, now.steps, now.skipped, now.clipped];
                let expected = [u32::from(!finite), applied, skipped, clipped];
                run.comparisons.push(Comparison::bits(format!("counts {step}"), &counts, &expected));
                let (given, steps) = now.clipped_by_value();
                let given = [given as u32, (given >> 32) as u32, steps];
                let expected = [values as u32, (values >> 32) as u32, value_steps];
                run.comparisons.push(Comparison::bits(format!("values clipped {step}"), &given, &expected));
                run.near(&format!("value {step}"), &value, &w, TIGHT)?;
                run.near(&format!("first {step}"), &first, &m, OUTPUT)?;
                if let Some(second) = &second {
                    run.near(&format!("second {step}"), second, &v, OUTPUT)?;
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}
