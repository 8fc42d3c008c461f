//! Sequences to sequences: reads dates the many ways in which people write them, and writes them as ISO 8601 does.
//!
//! ```sh
//! cargo run --release --example seq2seq                             # some minutes on a CPU
//! cargo run --release --example seq2seq -- --device vulkan:llvmpipe --steps 20   # software adapters are slow: few steps
//! ```
//!
//! "the twenty-second of May, nineteen oh five" is 1905-05-22, "12/3/2021" 2021-12-03, and "day 62 of 2021" asks for the calendar.
//! Every batch is new, and so are the held-out dates: there is no end of them. Nothing of a decoded date is read before its last
//! character: the loop runs on the device.

mod common;
#[path = "common/dates.rs"]
mod dates;

use std::f64::consts::PI;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Parser;
use dates::{DateTask, END, START};
use gatefold::data::{PAD, Vocabulary, pad};
use gatefold::nn::{Choice, Decoding, EncoderDecoderConfig, GruConfig, GruEncoderDecoder};
use gatefold::{Batch, CrossEntropy, Device, Ids, Lengths, Rng, Tensor, Trainer, optim::AdamW};

const EMBEDDING: usize = 32;
const HIDDEN: usize = 256;
/// Dates in one step of training.
const ROWS: usize = 64;
/// Batches whose dates are sorted by length together.
const SORTED: usize = 8;
const LEARNING_RATE: f64 = 4e-3;
/// Dates that tell how good the network is.
const HELD_OUT: usize = 1000;
/// Dates decoded side by side.
const DECODED: usize = 250;
/// Characters of an ISO date, and its end.
const ISO: usize = 11;

/// Trains a network to write dates as ISO 8601 does
#[derive(Parser)]
struct Args {
    /// Steps of training, each of 64 new dates
    #[arg(long, default_value_t = 6000, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Of the initial weights and of the dates
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Such as `cpu` or `vulkan:llvmpipe`; by default the best GPU, else the CPU
    #[arg(long)]
    device: Option<String>,
    /// Fail when less than this share of the held-out dates is right to the last character
    #[arg(long)]
    require: Option<f64>,
}

/// Dates as the network takes them.
struct Dates<'a> {
    device: &'a Device,
    source: Vocabulary,
    target: Vocabulary,
}

/// A number of dates: `(text, ISO date)`.
type Pairs = Vec<(String, String)>;

fn draw(count: usize, rng: &mut Rng) -> Pairs {
    (0..count).map(|_| DateTask::pair(rng)).collect()
}

/// Some batches, each of texts of like length, for there is less padding to read then; in a random order.
fn batches(rng: &mut Rng) -> Vec<Pairs> {
    let mut pairs = draw(SORTED * ROWS, rng);
    pairs.sort_by_key(|(text, _)| text.len());
    let mut batches: Vec<Pairs> = pairs.chunks(ROWS).map(<[_]>::to_vec).collect();
    rng.shuffle(&mut batches);
    batches
}

impl Dates<'_> {
    /// Texts as padded ids `[characters, rows]`.
    fn texts(&self, pairs: &[(String, String)]) -> Result<(Ids, Lengths)> {
        let padded = pad(&pairs.iter().map(|(text, _)| self.source.encode(text)).collect::<Vec<_>>(), PAD)?;
        let ids = Ids::from_slice(self.device, &padded.ids, [padded.steps, padded.rows])?;
        Ok((ids, Lengths::from_slice(self.device, &padded.lengths)?))
    }

    /// What the decoder sees, `<2021-03-03`, and what it is to say, `2021-03-03>`: `[11, rows]`.
    fn batch(&self, pairs: &[(String, String)]) -> Result<Batch> {
        let ids = |frame: &dyn Fn(&str) -> String| -> Result<Ids> {
            let padded = pad(&pairs.iter().map(|(_, iso)| self.target.encode(&frame(iso))).collect::<Vec<_>>(), PAD)?;
            Ok(Ids::from_slice(self.device, &padded.ids, [padded.steps, padded.rows])?)
        };
        let (source, lengths) = self.texts(pairs)?;
        let (seen, said) = (ids(&|iso| format!("{START}{iso}"))?, ids(&|iso| format!("{iso}{END}"))?);
        Ok(Batch::new(seen, said).source(&source, lengths))
    }

    /// The dates that the network writes for these texts.
    fn write(&self, model: &GruEncoderDecoder, pairs: &[(String, String)]) -> Result<Vec<String>> {
        let (source, lengths) = self.texts(pairs)?;
        let id = |mark: char| self.target.encode(&mark.to_string())[0];
        let decoding = Decoding { start: id(START), end: Some(id(END)), pad: PAD, max_steps: ISO, choice: Choice::Greedy };
        let rows = model.decode(&source, Some(&lengths), decoding)?.rows()?;
        Ok(rows.iter().map(|row| self.target.decode(row)).collect::<Result<_, _>>()?)
    }

    /// The share of dates that are right to the last character.
    fn exact(&self, model: &GruEncoderDecoder, pairs: &[(String, String)]) -> Result<f64> {
        let mut right = 0;
        for pairs in pairs.chunks(DECODED) {
            right += self.write(model, pairs)?.iter().zip(pairs).filter(|(written, (_, iso))| *written == iso).count();
        }
        Ok(right as f64 / pairs.len() as f64)
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let device = common::open_device(args.device.as_deref())?;
    let dates = Dates { device: &device, source: DateTask::source_vocabulary(), target: DateTask::target_vocabulary() };
    let mut rng = Rng::seed(args.seed);
    let config = EncoderDecoderConfig::new(dates.source.len(), dates.target.len(), GruConfig::new(EMBEDDING, HIDDEN));
    let mut trainer = Trainer::new(config.init(&device, &mut rng)?, CrossEntropy::new(), AdamW::new(LEARNING_RATE))?;
    trainer = trainer.clip_grad_norm(1.0);
    let held_out = draw(HELD_OUT, &mut rng);

    let bar = common::progress_bar(u64::from(args.steps) * ROWS as u64, "dates")?;
    let (start, mut recent, mut ahead) = (Instant::now(), Vec::new(), Vec::new());
    for step in 1..=args.steps {
        let done = f64::from(step - 1) / f64::from(args.steps);
        trainer.set_learning_rate(LEARNING_RATE * 0.5 * (1.0 + (PI * done).cos()));
        if ahead.is_empty() {
            ahead = batches(&mut rng);
        }
        if let Some(pairs) = ahead.pop() {
            recent.push(trainer.step(&dates.batch(&pairs)?)?.loss);
        }
        bar.inc(ROWS as u64);
        // Reading a loss waits for the device: now and then is enough.
        if step % 20 == 0 || step == args.steps {
            let count = recent.len() as f32;
            let loss = recent.drain(..).map(|loss: Tensor| loss.item()).sum::<gatefold::Result<f32>>()? / count;
            bar.set_message(format!("loss {loss:.4}"));
            if step % args.steps.div_ceil(10) < 20 && step < args.steps {
                let exact = dates.exact(trainer.model(), &held_out)?;
                bar.suspend(|| println!("step {step}: loss {loss:.4}, {:.1} % of the held-out dates are right", 100.0 * exact));
            }
        }
    }
    bar.finish();
    println!("Trained for {} steps in {:.1} s", args.steps, start.elapsed().as_secs_f32());

    let start = Instant::now();
    let exact = dates.exact(trainer.model(), &held_out)?;
    let rate = (HELD_OUT * ISO) as f32 / start.elapsed().as_secs_f32();
    println!("Of {HELD_OUT} held-out dates {:.1} % are right to the last character", 100.0 * exact);
    println!("Decoding wrote {rate:.0} characters/s, {DECODED} dates side by side");
    for ((text, iso), written) in held_out.iter().zip(dates.write(trainer.model(), &held_out[..12])?) {
        let mark = if written == *iso { "" } else { "  <- wrong" };
        println!("  {text:52} {written}{mark}");
    }
    if let Some(least) = args.require {
        ensure!(
            exact >= least,
            "{:.1} % of the held-out dates are right, required at least {:.1} %",
            100.0 * exact,
            100.0 * least
        );
    }
    Ok(())
}
