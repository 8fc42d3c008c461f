//! The textbook, in f64: what every kernel, layer, loss and optimizer must compute.
//!
//! This file shares no code with the rest of the crate but [`autodiff`](super::autodiff), and aims at being obviously right,
//! not fast. Tensors are row-major `f64` slices in time-major layouts; sizes are T steps, B rows, I inputs, H hidden, L layers,
//! D directions, G gates, S states. Slices of the wrong length panic: callers are tests. Gradients are checked by central
//! differences here and against PyTorch's in `case_file`.

use super::autodiff::{Tape, Var, sigmoid};
use std::array::from_fn;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

// ---- recurrent layers ----

/// The activation functions of ONNX's recurrent operators, by the definitions there.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the formulas name the fields")]
pub enum Activation {
    /// `tanh x`
    Tanh,
    /// `1 / (1 + e^-x)`
    Sigmoid,
    /// `max(0, x)`; its derivative at 0 is 0.
    Relu,
    /// `min(max(alpha x + beta, 0), 1)`
    HardSigmoid { alpha: f64, beta: f64 },
    /// `x` if `x >= 0`, else `alpha x`
    LeakyRelu { alpha: f64 },
    /// `x` if `x >= 0`, else `alpha (e^x - 1)`
    Elu { alpha: f64 },
    /// `x / (1 + |x|)`
    Softsign,
    /// `ln(1 + e^x)`
    Softplus,
    /// `alpha tanh(beta x)`
    ScaledTanh { alpha: f64, beta: f64 },
    /// `alpha x + beta`
    Affine { alpha: f64, beta: f64 },
    /// `x` if `x >= alpha`, else 0
    ThresholdedRelu { alpha: f64 },
}

impl Activation {
    /// The function of each element.
    pub fn of(self, x: Var<'_>) -> Var<'_> {
        match self {
            Activation::Tanh => x.tanh(),
            Activation::Sigmoid => x.sigmoid(),
            Activation::Relu => x.map(|x| if x <= 0.0 { (0.0, 0.0) } else { (x, 1.0) }),
            Activation::HardSigmoid { alpha, beta } => (x * alpha + beta).clamp(0.0, 1.0),
            Activation::LeakyRelu { alpha } => x.map(|x| if x >= 0.0 { (x, 1.0) } else { (alpha * x, alpha) }),
            Activation::Elu { alpha } => x.map(|x| if x >= 0.0 { (x, 1.0) } else { (alpha * x.exp_m1(), alpha * x.exp()) }),
            Activation::Softsign => x.map(|x| (x / (1.0 + x.abs()), (1.0 + x.abs()).powi(-2))),
            Activation::Softplus => x.softplus(),
            Activation::ScaledTanh { alpha, beta } => (x * beta).tanh() * alpha,
            Activation::Affine { alpha, beta } => x * alpha + beta,
            Activation::ThresholdedRelu { alpha } => x.map(|x| if x < alpha { (0.0, 0.0) } else { (x, 1.0) }),
        }
    }
}

/// Where the reset gate of a GRU acts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reset {
    /// On the recurrent product: PyTorch, cuDNN, ONNX with `linear_before_reset`.
    After,
    /// On h before the product: Cho et al. 2014, ONNX without `linear_before_reset`.
    Before,
}

/// The equations of a recurrent layer for one step. `x` and `r` are a gate's input part `W_ih x + b_ih` and recurrent part
/// `W_hh h + b_hh`; products of vectors are elementwise; an old state has a prime. State 0 is h.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the formulas name the fields")]
pub enum Cell {
    /// Elman 1990; one gate, state h:
    ///
    /// ```text
    /// h = activation(x + r)
    /// ```
    Rnn { activation: Activation },
    /// Gated recurrent unit, Cho et al. 2014; gates r, z, n, state h:
    ///
    /// ```text
    /// r, z = gate(x + r)    h = (1 - z) n + z h'
    /// n = candidate(x_n + r (W_hn h' + b_hn))      Reset::After
    /// n = candidate(x_n + W_hn (r h') + b_hn)      Reset::Before
    /// ```
    Gru { reset: Reset, gate: Activation, candidate: Activation },
    /// Long short-term memory, Hochreiter and Schmidhuber 1997, Gers et al. 2000; gates i, f, g, o, states h, c:
    ///
    /// ```text
    /// i, f, o = gate(x + r)    g = candidate(x + r)    c = f c' + i g    h = o output(c)
    /// ```
    Lstm {
        /// Of i, f, o.
        gate: Activation,
        /// Of g.
        candidate: Activation,
        /// Of c on its way to h.
        output: Activation,
        /// Gers and Schmidhuber 2000: `p_i c'` is added to x + r of i, `p_f c'` to that of f, `p_o c` to that of o.
        peepholes: bool,
        /// `f = 1 - i` (ONNX's `input_forget`); the weights of f stay unused.
        coupled: bool,
        /// c is held within -limit..limit: the state, and what o and h see.
        cell_clip: Option<f64>,
    },
    /// Independently recurrent network, Li et al. 2018; one gate, state h, and a vector u as `weight_hh`:
    ///
    /// ```text
    /// h = activation(x + u h' + b_hh)
    /// ```
    IndRnn { activation: Activation },
    /// The scalar LSTM of xLSTM, Beck et al. 2024, stabilized, with an exponential input gate and full recurrent matrices; gates
    /// i, f, z, o, states h, c, n, m:
    ///
    /// ```text
    /// i~, f~, z~, o~ = x + r
    /// m = max(log sigmoid(f~) + m', i~)    i = exp(i~ - m)    f = exp(log sigmoid(f~) + m' - m)
    /// c = f c' + i tanh(z~)    n = f n' + i    h = sigmoid(o~) c / n
    /// ```
    SLstm,
    /// Feng et al. 2024; gates z, n, which see x alone, state h:
    ///
    /// ```text
    /// h = (1 - z) h' + z g(x_n)    z = sigmoid(x)    g(v) = v + 1/2 if v >= 0, else sigmoid(v)
    /// ```
    MinGru,
    /// Feng et al. 2024; gates f, i, n, which see x alone, state h, g as in [`Cell::MinGru`]:
    ///
    /// ```text
    /// h = f / (f + i) h' + i / (f + i) g(x_n)    f, i = sigmoid(x)
    /// ```
    MinLstm,
}

impl Cell {
    /// PyTorch's `nn.RNN`.
    pub const RNN: Cell = Cell::Rnn { activation: Activation::Tanh };
    /// PyTorch's `nn.GRU`.
    pub const GRU: Cell = Cell::Gru { reset: Reset::After, gate: Activation::Sigmoid, candidate: Activation::Tanh };
    /// The same with the reset gate before the product.
    pub const GRU_RESET_BEFORE: Cell = Cell::Gru { reset: Reset::Before, gate: Activation::Sigmoid, candidate: Activation::Tanh };
    /// PyTorch's `nn.LSTM`.
    pub const LSTM: Cell = Cell::Lstm {
        gate: Activation::Sigmoid,
        candidate: Activation::Tanh,
        output: Activation::Tanh,
        peepholes: false,
        coupled: false,
        cell_clip: None,
    };

    /// G, the number of gates.
    pub fn gates(self) -> usize {
        match self {
            Cell::Rnn { .. } | Cell::IndRnn { .. } => 1,
            Cell::MinGru => 2,
            Cell::Gru { .. } | Cell::MinLstm => 3,
            Cell::Lstm { .. } | Cell::SLstm => 4,
        }
    }

    /// S, the number of states; state 0 is h.
    pub fn states(self) -> usize {
        match self {
            Cell::Lstm { .. } => 2,
            Cell::SLstm => 4,
            _ => 1,
        }
    }
}

/// How the outputs of two directions become the output of a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Merge {
    /// Forward, then reverse, as PyTorch does it.
    #[default]
    Concat,
    Sum,
    Mean,
    Product,
}

/// A stack of recurrent layers. R is the width of h: `projection`, or H without; W is the width of a layer's output: D*R where
/// outputs are concatenated, else R.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Recurrent {
    /// The equations of a step.
    pub cell: Cell,
    /// I, the width of the input of layer 0. The other layers take W values.
    pub input: usize,
    /// H.
    pub hidden: usize,
    /// L.
    pub layers: usize,
    /// D: 1 forward, 2 forward and reverse.
    pub directions: usize,
    /// Whether there are bias vectors.
    pub bias: bool,
    /// ONNX's `clip`: what goes into the activation of a gate is held within -limit..limit.
    pub pre_clip: Option<f64>,
    /// R of Sak et al. 2014: the cell's own output m \[H\] becomes `h = W_hr m + b_hr` \[R\].
    pub projection: Option<usize>,
    /// Layer normalization, Ba et al. 2016: `LN(v; a, b) = a (v - mean) / sqrt(variance + 1e-5) + b`, of both products without
    /// their biases and with gains alone, and for an LSTM of c on its way to h. An LSTM's four gates are normalized together, of a
    /// GRU r and z together and n alone.
    pub layer_norm: bool,
    /// With one direction: time is read in reverse.
    pub first_reverse: bool,
    /// With two directions: what becomes of their outputs.
    pub merge: Merge,
    /// A layer whose input is as wide as its output adds it to its output, after the output's dropout.
    pub residual: bool,
    /// Whether the factors of every product, forward and backward, are rounded to [`half()`] precision.
    pub half: bool,
}

/// The weights of one layer and direction, or gradients by them: what PyTorch calls `weight_ih_l0` is `weight_ih` here. What
/// there is and how long says [`Recurrent::parts`]; the row of gate g and unit j is `g*H + j`.
pub type Weights = BTreeMap<String, Vec<f64>>;

/// What [`Recurrent::forward_backward`] takes. Empty slices stand for zeros and for nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct RecurrentInput<'a> {
    /// B.
    pub batch: usize,
    /// \[T,B,I\].
    pub x: &'a [f64],
    /// The initial states, S of \[L*D,B,H\], the first \[L*D,B,R\]: for LSTM h0, c0.
    pub state: &'a [&'a [f64]],
    /// How many steps each row has \[B\], 0 to T; without it T in every row.
    pub lengths: Option<&'a [usize]>,
    /// Dropout between the layers: what multiplies the output of each layer but the last, L-1 of \[T,B,W\].
    pub masks: &'a [Vec<f64>],
    /// Zoneout, Krueger et al. 2017: a state becomes `k previous + (1 - k) new`. L*D of \[T, S, B, H\], with R for state 0.
    pub zoneout: Option<&'a [Vec<f64>]>,
    /// Gal and Ghahramani 2016: what multiplies h before the product of each gate, the same at all steps. L*D of \[G,B,R\].
    pub recurrent_masks: &'a [Vec<f64>],
    /// Teacher forcing in one forward layer, targets \[T,B,R\] and flags \[T,B\]: where a flag is set, from t = 1 on, step t
    /// takes `targets[t-1]` for h', everywhere in its equations.
    pub teacher: Option<(&'a [f64], &'a [bool])>,
    /// The loss's gradient by y \[T,B,W\].
    pub dy: &'a [f64],
    /// The loss's gradient by the final states, like `state`.
    pub dstate: &'a [&'a [f64]],
}

/// What [`Recurrent::forward_backward`] gives. Lists of L*D have `layer*D + direction` at their places.
#[derive(Clone, Debug, Default)]
pub struct RecurrentOutput {
    /// The last layer's output at every step \[T,B,W\], zero past a row's length.
    pub y: Vec<f64>,
    /// The states after each row's last processed step, S of \[L*D,B,H\], the first \[L*D,B,R\]: for LSTM hn, cn.
    pub state: Vec<Vec<f64>>,
    /// The states after every step, L*D times S of \[T,B,H\], the first \[T,B,R\]. Past its end a row has what it had last, in
    /// reverse its initial state.
    pub states: Vec<Vec<Vec<f64>>>,
    /// The gradient by x \[T,B,I\].
    pub dx: Vec<f64>,
    /// The gradients by the initial states, like `state`.
    pub dstate: Vec<Vec<f64>>,
    /// The whole gradients by the states after every step, like `states`: through all later steps, and what a state goes into in
    /// its own step (c into h). Zero past a row's length.
    pub dh: Vec<Vec<Vec<f64>>>,
    /// The gradients by the weights, L*D.
    pub dweights: Vec<Weights>,
}

/// The weights of one layer and direction on the tape of a row.
type Parts<'w, 't> = BTreeMap<&'w str, Var<'t>>;

/// One direction of one layer on the tape of a row: the states before the first step, after each step at its t, and last.
struct Walk<'t> {
    first: Vec<Var<'t>>,
    states: Vec<Vec<Var<'t>>>,
    last: Vec<Var<'t>>,
}

impl Recurrent {
    /// One forward layer with biases and nothing else.
    pub fn new(cell: Cell, input: usize, hidden: usize) -> Self {
        Self {
            cell,
            input,
            hidden,
            layers: 1,
            directions: 1,
            bias: true,
            pre_clip: None,
            projection: None,
            layer_norm: false,
            first_reverse: false,
            merge: Merge::Concat,
            residual: false,
            half: false,
        }
    }

    /// What is done to a factor of a product.
    fn round(&self) -> fn(f64) -> f64 {
        if self.half { half } else { |factor| factor }
    }

    /// Names and lengths of the weights of `layer`, in PyTorch's order as far as PyTorch has them. Whatever begins with `bias`,
    /// and `norm_c_bias`, may be left out and is zero then.
    pub fn parts(&self, layer: usize) -> Vec<(&'static str, usize)> {
        let (hidden, rows, h) = (self.hidden, self.cell.gates() * self.hidden, self.h_width());
        let mut parts = vec![("weight_ih", rows * if layer == 0 { self.input } else { self.width() })];
        match self.cell {
            Cell::MinGru | Cell::MinLstm => parts.push(("bias_ih", rows)),
            Cell::IndRnn { .. } => parts.extend([("weight_hh", hidden), ("bias_ih", rows), ("bias_hh", rows)]),
            _ => parts.extend([("weight_hh", rows * h), ("bias_ih", rows), ("bias_hh", rows)]),
        }
        if self.projection.is_some() {
            parts.extend([("weight_hr", h * hidden), ("bias_hr", h)]);
        }
        if matches!(self.cell, Cell::Lstm { peepholes: true, .. }) {
            parts.push(("weight_peephole", 3 * hidden)); // of i, f, o
        }
        if self.layer_norm {
            parts.extend([("norm_ih", rows), ("norm_hh", rows)]);
            if matches!(self.cell, Cell::Lstm { .. }) {
                parts.extend([("norm_c", hidden), ("norm_c_bias", hidden)]);
            }
        }
        parts.retain(|(name, _)| self.bias || !name.starts_with("bias"));
        parts
    }

    /// R.
    fn h_width(&self) -> usize {
        self.projection.unwrap_or(self.hidden)
    }

    /// W.
    fn width(&self) -> usize {
        if self.merge == Merge::Concat { self.directions * self.h_width() } else { self.h_width() }
    }

    /// The width of each state \[S\].
    fn state_widths(&self) -> Vec<usize> {
        (0..self.cell.states()).map(|s| if s == 0 { self.h_width() } else { self.hidden }).collect()
    }

    /// Runs the stack over a batch and back. A row of length n sees its steps 0, 1, .., n-1, and in the reverse direction
    /// n-1, .., 1, 0; a row of length 0 returns its initial states. `weights` lie at `layer*D + direction`.
    pub fn forward_backward(&self, weights: &[Weights], input: RecurrentInput<'_>) -> RecurrentOutput {
        let steps = self.check(weights, &input);
        let (batch, slots, widths) = (input.batch, weights.len(), self.state_widths());
        let blocks = |lines: usize| -> Vec<Vec<f64>> { widths.iter().map(|width| vec![0.0; lines * width]).collect() };
        let mut output = RecurrentOutput {
            y: vec![0.0; steps * batch * self.width()],
            state: blocks(slots * batch),
            states: vec![blocks(steps * batch); slots],
            dx: vec![0.0; input.x.len()],
            dstate: blocks(slots * batch),
            dh: vec![blocks(steps * batch); slots],
            dweights: weights.to_vec(),
        };
        output.dweights.iter_mut().flat_map(|w| w.values_mut()).for_each(|part| part.fill(0.0));
        type Shared<'a> = Vec<(&'a str, Rc<[f64]>)>;
        let shared: Vec<Shared<'_>> =
            weights.iter().map(|w| w.iter().map(|(name, part)| (name.as_str(), part[..].into())).collect()).collect();

        // Rows share nothing but weights: each has a tape of its own.
        for row in 0..batch {
            let length = input.lengths.map_or(steps, |lengths| lengths[row]);
            let tape = Tape::default();
            let parts: Vec<Parts<'_, '_>> =
                shared.iter().map(|w| w.iter().map(|(name, part)| (*name, tape.leaf(part.clone()))).collect()).collect();
            let xs: Vec<Var<'_>> = (0..length).map(|t| tape.leaf(line(input.x, t * batch + row, self.input))).collect();
            let (ys, walks) = self.stack(&tape, &parts, &input, row, &xs);

            let mut seeds: Vec<(Var<'_>, &[f64])> = Vec::new();
            if !input.dy.is_empty() {
                seeds.extend(ys.iter().enumerate().map(|(t, y)| (*y, line(input.dy, t * batch + row, self.width()))));
            }
            for (slot, walk) in walks.iter().enumerate() {
                let d = input.dstate.iter().zip(&widths).map(|(d, width)| line(d, slot * batch + row, *width));
                seeds.extend(walk.last.iter().copied().zip(d));
            }
            let gradients = tape.backward(&seeds);

            for (t, (x, y)) in xs.iter().zip(&ys).enumerate() {
                put(&mut output.y, t * batch + row, &y.value());
                put(&mut output.dx, t * batch + row, &gradients[*x]);
            }
            for (slot, walk) in walks.iter().enumerate() {
                for s in 0..widths.len() {
                    put(&mut output.state[s], slot * batch + row, &walk.last[s].value());
                    put(&mut output.dstate[s], slot * batch + row, &gradients[walk.first[s]]);
                    for t in 0..steps {
                        let padding = if self.reads_in_reverse(slot) { &walk.first } else { &walk.last };
                        let states = walk.states.get(t).unwrap_or(padding);
                        put(&mut output.states[slot][s], t * batch + row, &states[s].value());
                        if t < length {
                            put(&mut output.dh[slot][s], t * batch + row, &gradients[states[s]]);
                        }
                    }
                }
                for (name, part) in &parts[slot] {
                    let sum = output.dweights[slot].get_mut(*name).into_iter().flatten();
                    sum.zip(&gradients[*part]).for_each(|(sum, term)| *sum += term);
                }
            }
        }
        output
    }

    /// Panics over whatever does not fit; gives T.
    fn check(&self, weights: &[Weights], input: &RecurrentInput<'_>) -> usize {
        let (batch, slots, widths) = (input.batch, self.layers * self.directions, self.state_widths());
        let steps = input.x.len() / (batch * self.input);
        let (lines, h) = (steps * batch, self.h_width());
        let width: usize = widths.iter().sum();
        let is_lstm = matches!(self.cell, Cell::Lstm { .. });
        let has_product = !matches!(self.cell, Cell::IndRnn { .. } | Cell::MinGru | Cell::MinLstm);
        let is_gru = matches!(self.cell, Cell::Gru { .. });
        assert!(self.layers > 0 && (1..=2).contains(&self.directions) && !(self.first_reverse && self.directions == 2));
        assert!(self.projection.is_none() || (has_product && !is_gru), "h of {:?} cannot be projected", self.cell);
        assert!(!self.layer_norm || is_lstm || matches!(self.cell, Cell::Gru { reset: Reset::After, .. }), "no layer_norm there");

        assert_eq!(input.x.len(), lines * self.input, "x");
        assert!(input.lengths.is_none_or(|n| n.len() == batch && n.iter().all(|n| *n <= steps)), "lengths");
        assert!(input.dy.is_empty() || input.dy.len() == lines * self.width(), "dy");
        for states in [input.state, input.dstate].into_iter().filter(|states| !states.is_empty()) {
            assert!(states.iter().map(|state| state.len()).eq(widths.iter().map(|width| slots * batch * width)), "states");
        }
        let all = |given: &[Vec<f64>], count: usize, len: usize| given.len() == count && given.iter().all(|v| v.len() == len);
        assert!(input.masks.is_empty() || all(input.masks, self.layers - 1, lines * self.width()), "masks");
        assert!(input.zoneout.is_none_or(|k| all(k, slots, lines * width)), "zoneout");
        let masks = input.recurrent_masks;
        assert!(masks.is_empty() || all(masks, slots, self.cell.gates() * batch * h), "recurrent_masks");
        assert!(masks.is_empty() || !matches!(self.cell, Cell::MinGru | Cell::MinLstm), "no product to mask");
        if let Some((targets, flags)) = input.teacher {
            assert!(slots == 1 && !self.first_reverse && targets.len() == lines * h && flags.len() == lines, "teacher");
        }
        assert_eq!(weights.len(), slots);
        for (slot, given) in weights.iter().enumerate() {
            let parts: BTreeMap<_, _> = self.parts(slot / self.directions).into_iter().collect();
            for (name, part) in given {
                assert_eq!(Some(&part.len()), parts.get(name.as_str()), "{name}");
            }
            for name in parts.keys() {
                assert!(given.contains_key(*name) || name.contains("bias"), "no {name}");
            }
        }
        steps
    }

    fn reads_in_reverse(&self, slot: usize) -> bool {
        self.first_reverse || slot % self.directions == 1
    }

    /// All layers over the inputs `xs` of one row: the outputs, and the walks \[L*D\].
    fn stack<'t>(
        &self,
        tape: &'t Tape,
        parts: &[Parts<'_, 't>],
        input: &RecurrentInput<'_>,
        row: usize,
        xs: &[Var<'t>],
    ) -> (Vec<Var<'t>>, Vec<Walk<'t>>) {
        let mut walks: Vec<Walk<'t>> = Vec::new();
        let mut xs = xs.to_vec();
        for layer in 0..self.layers {
            let slots = layer * self.directions..(layer + 1) * self.directions;
            walks.extend(slots.clone().map(|slot| self.walk(tape, &parts[slot], input, row, slot, &xs)));
            let output = |(t, x): (usize, &Var<'t>)| {
                let h: Vec<Var<'t>> = walks[slots.clone()].iter().map(|walk| walk.states[t][0]).collect();
                let mut y = match (&h[..], self.merge) {
                    ([h], _) => *h,
                    (h, Merge::Concat) => tape.concat(h),
                    (h, Merge::Sum) => h[0] + h[1],
                    (h, Merge::Mean) => (h[0] + h[1]) * 0.5,
                    (h, Merge::Product) => h[0] * h[1],
                };
                if layer + 1 < self.layers && !input.masks.is_empty() {
                    y = y * tape.leaf(line(&input.masks[layer], t * input.batch + row, self.width()));
                }
                if self.residual && x.len() == y.len() { *x + y } else { y }
            };
            xs = xs.iter().enumerate().map(output).collect();
        }
        (xs, walks)
    }

    /// One direction of one layer over the inputs `xs` of one row.
    fn walk<'t>(
        &self,
        tape: &'t Tape,
        parts: &Parts<'_, 't>,
        input: &RecurrentInput<'_>,
        row: usize,
        slot: usize,
        xs: &[Var<'t>],
    ) -> Walk<'t> {
        let (batch, widths) = (input.batch, self.state_widths());
        let initial = |(s, width): (usize, &usize)| match input.state.get(s) {
            Some(state) => tape.leaf(line(state, slot * batch + row, *width)),
            None => tape.leaf(vec![0.0; *width]),
        };
        let first: Vec<Var<'t>> = widths.iter().enumerate().map(initial).collect();
        let mask = |mask: &Vec<f64>| -> Vec<Var<'t>> {
            (0..self.cell.gates()).map(|gate| tape.leaf(line(mask, gate * batch + row, self.h_width()))).collect()
        };
        let masks = input.recurrent_masks.get(slot).map(mask).unwrap_or_default();

        let mut states = vec![Vec::new(); xs.len()];
        let mut last = first.clone();
        let mut order: Vec<usize> = (0..xs.len()).collect();
        if self.reads_in_reverse(slot) {
            order.reverse();
        }
        for t in order {
            let mut previous = last;
            if let Some((targets, flags)) = input.teacher
                && t > 0
                && flags[t * batch + row]
            {
                previous[0] = tape.leaf(line(targets, (t - 1) * batch + row, self.h_width()));
            }
            let step = Step { spec: self, tape, parts, masks: &masks, x: xs[t] };
            let mut next = step.cell(&previous);
            if self.projection.is_some() {
                let o = parts["weight_hr"].product_of(0..self.h_width(), next[0], self.round());
                next[0] = step.plus("bias_hr", 0..self.h_width(), o);
            }
            if let Some(zoneout) = input.zoneout {
                let mut at = t * batch * widths.iter().sum::<usize>();
                for s in 0..next.len() {
                    let k = tape.leaf(line(&zoneout[slot][at..], row, widths[s]));
                    next[s] = k * previous[s] + (1.0 - k) * next[s];
                    at += batch * widths[s];
                }
            }
            states[t] = next.clone();
            last = next;
        }
        Walk { first, states, last }
    }
}

/// One step of one row.
struct Step<'s, 't> {
    spec: &'s Recurrent,
    tape: &'t Tape,
    parts: &'s Parts<'s, 't>,
    /// What multiplies h before the product of each gate \[G\], if anything does.
    masks: &'s [Var<'t>],
    x: Var<'t>,
}

impl<'t> Step<'_, 't> {
    /// The new states from the previous ones: the equations at [`Cell`]. h is not projected yet.
    fn cell(&self, previous: &[Var<'t>]) -> Vec<Var<'t>> {
        let h = previous[0];
        match self.spec.cell {
            Cell::Rnn { activation } => {
                let [a] = self.sums(h);
                vec![activation.of(self.clip(a))]
            }
            Cell::Gru { reset, gate, candidate } => {
                let (x, u): ([Var<'t>; 3], [Var<'t>; 3]) = (self.input_parts(), self.recurrent_parts(h));
                let r = gate.of(self.clip(x[0] + u[0]));
                let z = gate.of(self.clip(x[1] + u[1]));
                let n = match reset {
                    Reset::After => x[2] + r * u[2],
                    Reset::Before => x[2] + self.plus("bias_hh", self.rows(2), self.recurrent_product(2, r * h)),
                };
                let n = candidate.of(self.clip(n));
                vec![(1.0 - z) * n + z * h]
            }
            Cell::Lstm { gate, candidate, output, coupled, cell_clip, .. } => {
                let c = previous[1];
                let [i, f, g, o] = self.sums(h);
                let i = gate.of(self.clip(self.peephole(i, 0, c)));
                let f = if coupled { 1.0 - i } else { gate.of(self.clip(self.peephole(f, 1, c))) };
                let g = candidate.of(self.clip(g));
                let c = f * c + i * g;
                let c = cell_clip.map_or(c, |limit| c.clamp(-limit, limit));
                let o = gate.of(self.clip(self.peephole(o, 2, c)));
                vec![o * output.of(self.normalized_cell(c)), c]
            }
            Cell::IndRnn { activation } => {
                let [x] = self.input_parts();
                let h = self.masks.first().map_or(h, |mask| *mask * h);
                let r = self.plus("bias_hh", self.rows(0), self.parts["weight_hh"] * h);
                vec![activation.of(self.clip(x + r))]
            }
            Cell::SLstm => {
                let [c, n, m_before] = from_fn(|s| previous[s + 1]);
                let [i, f, z, o] = self.sums(h).map(|sum| self.clip(sum));
                let log_f = -(-f).softplus();
                let m = (log_f + m_before).max(i);
                let i = (i - m).exp();
                let f = (log_f + m_before - m).exp();
                let c = f * c + i * z.tanh();
                let n = f * n + i;
                vec![o.sigmoid() * c / n, c, n, m]
            }
            Cell::MinGru => {
                let [z, n] = self.input_parts().map(|x| self.clip(x));
                let z = z.sigmoid();
                vec![(1.0 - z) * h + z * min_g(n)]
            }
            Cell::MinLstm => {
                let [f, i, n] = self.input_parts().map(|x| self.clip(x));
                let (f, i) = (f.sigmoid(), i.sigmoid());
                vec![f / (f + i) * h + i / (f + i) * min_g(n)]
            }
        }
    }

    /// `x + r` of every gate.
    fn sums<const G: usize>(&self, h: Var<'t>) -> [Var<'t>; G] {
        let (x, r) = (self.input_parts::<G>(), self.recurrent_parts::<G>(h));
        from_fn(|gate| x[gate] + r[gate])
    }

    /// `W_ih x + b_ih` of every gate.
    fn input_parts<const G: usize>(&self) -> [Var<'t>; G] {
        let products = from_fn(|gate| self.parts["weight_ih"].product_of(self.rows(gate), self.x, self.spec.round()));
        let products: [Var<'t>; G] = self.normalized("norm_ih", products);
        from_fn(|gate| self.plus("bias_ih", self.rows(gate), products[gate]))
    }

    /// `W_hh h + b_hh` of every gate.
    fn recurrent_parts<const G: usize>(&self, h: Var<'t>) -> [Var<'t>; G] {
        let products: [Var<'t>; G] = self.normalized("norm_hh", from_fn(|gate| self.recurrent_product(gate, h)));
        from_fn(|gate| self.plus("bias_hh", self.rows(gate), products[gate]))
    }

    /// `W_hh h` of one gate, with the mask on h.
    fn recurrent_product(&self, gate: usize, h: Var<'t>) -> Var<'t> {
        let h = self.masks.get(gate).map_or(h, |mask| *mask * h);
        self.parts["weight_hh"].product_of(self.rows(gate), h, self.spec.round())
    }

    fn rows(&self, gate: usize) -> Range<usize> {
        gate * self.spec.hidden..(gate + 1) * self.spec.hidden
    }

    /// `v` and that range of a bias, if there is one.
    fn plus(&self, bias: &str, range: Range<usize>, v: Var<'t>) -> Var<'t> {
        self.parts.get(bias).map_or(v, |bias| v + bias.slice(range))
    }

    /// `v` and peephole `k` times c, if there are any.
    fn peephole(&self, v: Var<'t>, k: usize, c: Var<'t>) -> Var<'t> {
        self.parts.get("weight_peephole").map_or(v, |peepholes| v + peepholes.slice(self.rows(k)) * c)
    }

    fn clip(&self, v: Var<'t>) -> Var<'t> {
        self.spec.pre_clip.map_or(v, |limit| v.clamp(-limit, limit))
    }

    /// Layer normalization of the gates' products, if the layer has any.
    fn normalized<const G: usize>(&self, gain: &str, products: [Var<'t>; G]) -> [Var<'t>; G] {
        if !self.spec.layer_norm {
            return products;
        }
        // How many gates are normalized together.
        let groups = if matches!(self.spec.cell, Cell::Gru { .. }) { vec![2, 1] } else { vec![G] };
        let mut normalized = products;
        let mut first = 0;
        for count in groups {
            let gains = self.parts[gain].slice(self.rows(first).start..self.rows(first + count).start);
            let all = layer_norm(self.tape.concat(&products[first..first + count]), gains);
            for gate in 0..count {
                normalized[first + gate] = all.slice(self.rows(gate));
            }
            first += count;
        }
        normalized
    }

    /// c on its way to h: layer normalization, if the layer has any.
    fn normalized_cell(&self, c: Var<'t>) -> Var<'t> {
        if !self.spec.layer_norm {
            return c;
        }
        self.plus("norm_c_bias", 0..c.len(), layer_norm(c, self.parts["norm_c"]))
    }
}

/// `gain (v - mean) / sqrt(variance + 1e-5)` with the biased variance.
fn layer_norm<'t>(v: Var<'t>, gain: Var<'t>) -> Var<'t> {
    let mean = |v: Var<'t>| v.sum() * (1.0 / v.len() as f64);
    let centred = v - mean(v).repeat(v.len());
    let deviation = (mean(centred * centred) + 1e-5).sqrt();
    gain * centred / deviation.repeat(v.len())
}

/// g of [`Cell::MinGru`].
fn min_g(v: Var<'_>) -> Var<'_> {
    v.map(|v| if v >= 0.0 { (v + 0.5, 1.0) } else { (sigmoid(v), sigmoid(v) * sigmoid(-v)) })
}

/// Line `n` of lines of `width` values.
fn line(values: &[f64], n: usize, width: usize) -> &[f64] {
    &values[n * width..(n + 1) * width]
}

/// Overwrites line `n` of lines as wide as `values`.
fn put(all: &mut [f64], n: usize, values: &[f64]) {
    all[n * values.len()..(n + 1) * values.len()].copy_from_slice(values);
}

fn add(sum: &mut [f64], terms: &[f64]) {
    assert_eq!(sum.len(), terms.len());
    for (sum, term) in sum.iter_mut().zip(terms) {
        *sum += term;
    }
}

// ---- products ----

/// The nearest number of IEEE 754 binary16, ties to even: 11 significant bits, below 2^-14 multiples of 2^-24, infinity from 65520 on.
pub fn half(x: f64) -> f64 {
    if !x.is_finite() || x == 0.0 {
        return x;
    }
    let exponent = (x.to_bits() >> 52 & 0x7ff) as i32 - 1023;
    let unit = 2.0f64.powi(exponent.max(-14) - 10);
    let rounded = (x / unit).round_ties_even() * unit;
    if rounded.abs() > 65504.0 { f64::INFINITY.copysign(x) } else { rounded }
}

/// `C[i,j] = sum over p of A[i,p] B[p,j]` with A \[m,k\] and B \[k,n\]; a transposed operand is stored \[k,m\] or \[n,k\].
pub fn matmul(a: &[f64], b: &[f64], m: usize, n: usize, k: usize, transpose_a: bool, transpose_b: bool) -> Vec<f64> {
    assert_eq!((a.len(), b.len()), (m * k, k * n));
    let mut c = vec![0.0; m * n];
    for i in 0..m {
        for j in 0..n {
            for p in 0..k {
                let a = if transpose_a { a[p * m + i] } else { a[i * k + p] };
                let b = if transpose_b { b[j * k + p] } else { b[p * n + j] };
                c[i * n + j] += a * b;
            }
        }
    }
    c
}

/// `y = x W^T + b` \[N,O\] with x \[N,I\], W \[O,I\], b \[O\].
pub fn linear(x: &[f64], weight: &[f64], bias: Option<&[f64]>, inputs: usize, outputs: usize) -> Vec<f64> {
    let lines = x.len() / inputs;
    let mut y = matmul(x, weight, lines, outputs, inputs, false, true);
    if let Some(bias) = bias {
        for line in y.chunks_exact_mut(outputs) {
            add(line, bias);
        }
    }
    y
}

/// What [`linear_backward`] gives.
#[derive(Clone, Debug)]
pub struct LinearGradients {
    /// `dy W` \[N,I\].
    pub dx: Vec<f64>,
    /// `dy^T x` \[O,I\].
    pub dweight: Vec<f64>,
    /// The column sums of dy \[O\].
    pub dbias: Vec<f64>,
}

/// The gradients of [`linear`], from dy \[N,O\].
pub fn linear_backward(x: &[f64], weight: &[f64], dy: &[f64], inputs: usize, outputs: usize) -> LinearGradients {
    let lines = x.len() / inputs;
    let mut dbias = vec![0.0; outputs];
    for line in dy.chunks_exact(outputs) {
        add(&mut dbias, line);
    }
    LinearGradients {
        dx: matmul(dy, weight, lines, inputs, outputs, false, false),
        dweight: matmul(dy, x, outputs, inputs, lines, true, false),
        dbias,
    }
}

/// Row `ids[n]` of weight \[V,E\] for each n: \[N,E\].
pub fn embedding(ids: &[u32], weight: &[f64], width: usize) -> Vec<f64> {
    ids.iter().flat_map(|&id| &weight[id as usize * width..][..width]).copied().collect()
}

/// The gradient of [`embedding`] by its weight \[V,E\]: line n of dy \[N,E\] is added to row `ids[n]`.
pub fn embedding_backward(ids: &[u32], dy: &[f64], vocabulary: usize, width: usize) -> Vec<f64> {
    let mut dweight = vec![0.0; vocabulary * width];
    for (&id, line) in ids.iter().zip(dy.chunks_exact(width)) {
        add(&mut dweight[id as usize * width..][..width], line);
    }
    dweight
}

// ---- losses ----

/// The mean over counted lines of `-log softmax(logits)[target]`, and its gradient `(softmax - onehot(target)) / counted` by
/// the logits \[N,V\]. Lines whose target \[N\] is `ignored` are not counted and have zero gradient; no counted line at all
/// gives NaN.
pub fn cross_entropy(logits: &[f64], vocabulary: usize, targets: &[u32], ignored: Option<u32>) -> (f64, Vec<f64>) {
    assert_eq!(logits.len(), targets.len() * vocabulary);
    let counted = targets.iter().filter(|&&target| Some(target) != ignored).count() as f64;
    let mut loss = 0.0;
    let mut dlogits = vec![0.0; logits.len()];
    for (n, &target) in targets.iter().enumerate() {
        if Some(target) == ignored {
            continue;
        }
        let line = &logits[n * vocabulary..][..vocabulary];
        let largest = line.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = line.iter().map(|z| (z - largest).exp()).sum();
        loss += largest + sum.ln() - line[target as usize];
        for class in 0..vocabulary {
            let onehot = if class == target as usize { 1.0 } else { 0.0 };
            dlogits[n * vocabulary + class] = ((line[class] - largest).exp() / sum - onehot) / counted;
        }
    }
    (loss / counted, dlogits)
}

/// The mean over counted elements of `(prediction - target)^2`, and its gradient by the prediction, zero where an element is not
/// counted; no counted element at all gives NaN.
pub fn mean_squared_error(prediction: &[f64], target: &[f64], counted: &[bool]) -> (f64, Vec<f64>) {
    assert_eq!((prediction.len(), target.len()), (counted.len(), counted.len()));
    let count = counted.iter().filter(|&&counts| counts).count() as f64;
    let mut loss = 0.0;
    let mut d = vec![0.0; prediction.len()];
    for n in 0..prediction.len() {
        if counted[n] {
            let difference = prediction[n] - target[n];
            loss += difference * difference;
            d[n] = 2.0 * difference / count;
        }
    }
    (loss / count, d)
}

// ---- optimizers ----

/// The square root of the sum of the squares of all gradients together.
pub fn global_norm(gradients: &[&[f64]]) -> f64 {
    gradients.iter().flat_map(|gradient| gradient.iter()).map(|g| g * g).sum::<f64>().sqrt()
}

/// What multiplies the gradients in `torch.nn.utils.clip_grad_norm_`: `min(1, max_norm / (norm + 1e-6))`.
pub fn clip_factor(norm: f64, max_norm: f64) -> f64 {
    (max_norm / (norm + 1e-6)).min(1.0)
}

/// `torch.optim.SGD` without dampening and Nesterov: `d = g + weight_decay p; m = momentum m + d; p = p - lr m`.
#[derive(Clone, Copy, Debug)]
pub struct Sgd {
    /// Learning rate.
    pub lr: f64,
    /// Momentum, 0 for none.
    pub momentum: f64,
    /// L2 penalty, coupled: it goes through the momentum.
    pub weight_decay: f64,
}

impl Sgd {
    /// One step. `velocity` is zero before the first.
    pub fn step(&self, parameter: &mut [f64], gradient: &[f64], velocity: &mut [f64]) {
        for n in 0..parameter.len() {
            let d = gradient[n] + self.weight_decay * parameter[n];
            velocity[n] = self.momentum * velocity[n] + d;
            parameter[n] -= self.lr * velocity[n];
        }
    }
}

/// `torch.optim.AdamW` without AMSGrad (Loshchilov and Hutter 2019). Step t = 1, 2, ..:
///
/// ```text
/// p = p - lr weight_decay p
/// m = beta1 m + (1 - beta1) g         v = beta2 v + (1 - beta2) g^2
/// p = p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + epsilon)
/// ```
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the mean of the gradients.
    pub beta1: f64,
    /// Decay of the mean of their squares.
    pub beta2: f64,
    /// Keeps the denominator away from zero.
    pub epsilon: f64,
    /// Decoupled decay of the weights.
    pub weight_decay: f64,
}

impl AdamW {
    /// Step `t`, counted from 1. Both moments are zero before the first.
    pub fn step(&self, parameter: &mut [f64], gradient: &[f64], mean: &mut [f64], square: &mut [f64], t: i32) {
        for n in 0..parameter.len() {
            let g = gradient[n];
            parameter[n] -= self.lr * self.weight_decay * parameter[n];
            mean[n] = self.beta1 * mean[n] + (1.0 - self.beta1) * g;
            square[n] = self.beta2 * square[n] + (1.0 - self.beta2) * g * g;
            let m = mean[n] / (1.0 - self.beta1.powi(t));
            let v = square[n] / (1.0 - self.beta2.powi(t));
            parameter[n] -= self.lr * m / (v.sqrt() + self.epsilon);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_precision_is_binary16() {
        for (x, expected) in [
            (0.0, 0.0),
            (1.0 / 3.0, 0.333251953125),
            (2049.0, 2048.0),
            (2051.0, 2052.0),
            (65504.0, 65504.0),
            (65519.0, 65504.0),
            (-65520.0, f64::NEG_INFINITY),
            (2.0f64.powi(-24), 2.0f64.powi(-24)),
            (2.0f64.powi(-25), 0.0),
            (1.5 * 2.0f64.powi(-24), 2.0f64.powi(-23)),
            (1e-300, 0.0),
        ] {
            assert_eq!(half(x), expected, "{x}");
        }
        // Every number of it is its own.
        for bits in 0..0x7c00u16 {
            let x = half::f16::from_bits(bits).to_f64();
            assert_eq!((half(x), half(-x)), (x, -x));
        }
    }

    /// Numbers in -1..1 from a linear congruential generator (Knuth's MMIX constants).
    struct Numbers(u64);

    impl Numbers {
        fn next(&mut self) -> f64 {
            self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (self.0 >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        }

        fn vec(&mut self, count: usize) -> Vec<f64> {
            (0..count).map(|_| self.next()).collect()
        }
    }

    fn dot(a: &[f64], b: &[f64]) -> f64 {
        assert_eq!(a.len(), b.len());
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    /// Compares `gradient` with differences of `f` in every coordinate of `at`: `(f(p + e) - f(p - e)) / 2e`, and where the
    /// function is too curved for that, its extrapolation to e = 0.
    fn check(what: &str, at: &[f64], gradient: &[f64], mut f: impl FnMut(&[f64]) -> f64) {
        assert_eq!(at.len(), gradient.len(), "{what}");
        let mut p = at.to_vec();
        for n in 0..at.len() {
            let mut slope = |e: f64| {
                p[n] = at[n] + e;
                let above = f(&p);
                p[n] = at[n] - e;
                (above - f(&p)) / (2.0 * e)
            };
            let agrees = |difference: f64| (difference - gradient[n]).abs() <= 1e-8;
            let mut difference = slope(1e-5);
            if !agrees(difference) {
                difference = (4.0 * difference - slope(2e-5)) / 3.0;
            }
            p[n] = at[n];
            assert!(agrees(difference), "{what}[{n}]: {} but differences give {difference}", gradient[n]);
        }
    }

    /// A stack and what it is given besides x, states and gradients.
    #[derive(Clone, Copy)]
    struct Case {
        name: &'static str,
        spec: Recurrent,
        steps: usize,
        lengths: Option<&'static [usize]>,
        dropout: bool,
        zoneout: bool,
        recurrent_masks: bool,
        teacher: bool,
    }

    /// Every cell and every option, and the options that meet in one place.
    fn cases() -> Vec<Case> {
        use Activation::*;
        let lstm = |gate, candidate, output, peepholes, coupled, cell_clip| Cell::Lstm {
            gate,
            candidate,
            output,
            peepholes,
            coupled,
            cell_clip,
        };
        let peepholes = lstm(Sigmoid, Tanh, Tanh, true, false, None);
        let everything = lstm(Sigmoid, Tanh, Tanh, true, true, Some(0.4));
        let before = Cell::Gru { reset: Reset::Before, gate: Sigmoid, candidate: Tanh };
        let two = |cell| Recurrent { layers: 2, directions: 2, ..Recurrent::new(cell, 3, 2) };
        let plain = Case::new;
        let rnn = |name, activation| plain(name, two(Cell::Rnn { activation }));
        let masks = |name, cell| Case {
            dropout: true,
            zoneout: true,
            recurrent_masks: !matches!(cell, Cell::MinGru | Cell::MinLstm),
            ..plain(name, two(cell))
        };
        let teacher = |name, cell| Case { teacher: true, zoneout: true, ..plain(name, Recurrent::new(cell, 3, 2)) };
        let clipped = |name, cell| plain(name, Recurrent { pre_clip: Some(0.6), ..two(cell) });
        let reverse = |name, cell| plain(name, Recurrent { first_reverse: true, layers: 2, ..Recurrent::new(cell, 3, 2) });
        let projected = |name, cell| masks(name, cell).with(|spec| spec.projection = Some(3));
        let normalized = |name, cell| masks(name, cell).with(|spec| spec.layer_norm = true);
        vec![
            Case { steps: 1, lengths: None, ..plain("one step", Recurrent::new(Cell::LSTM, 1, 1)) },
            Case { lengths: None, ..plain("no bias", Recurrent { bias: false, ..Recurrent::new(Cell::LSTM, 3, 2) }) },
            Case {
                dropout: true,
                ..plain("dropout", Recurrent { layers: 3, directions: 2, ..Recurrent::new(Cell::LSTM, 2, 3) })
            },
            rnn("tanh", Tanh),
            rnn("sigmoid", Sigmoid),
            rnn("relu", Relu),
            rnn("hard sigmoid", HardSigmoid { alpha: 0.4, beta: 0.5 }),
            rnn("leaky relu", LeakyRelu { alpha: 0.1 }),
            rnn("elu", Elu { alpha: 0.7 }),
            rnn("softsign", Softsign),
            rnn("softplus", Softplus),
            rnn("scaled tanh", ScaledTanh { alpha: 1.7, beta: 0.6 }),
            rnn("affine", Affine { alpha: 0.5, beta: 0.2 }),
            rnn("thresholded relu", ThresholdedRelu { alpha: 0.1 }),
            plain("lstm", two(Cell::LSTM)),
            plain(
                "lstm of other functions",
                two(lstm(HardSigmoid { alpha: 0.3, beta: 0.4 }, Softsign, Elu { alpha: 0.5 }, false, false, None)),
            ),
            plain("peepholes", two(peepholes)),
            plain("coupled", two(lstm(Sigmoid, Tanh, Tanh, false, true, None))),
            plain("cell clip", two(lstm(Sigmoid, Tanh, Tanh, false, false, Some(0.3)))),
            plain("gru", two(Cell::GRU)),
            plain("gru before", two(before)),
            plain(
                "gru of other functions",
                two(Cell::Gru { reset: Reset::Before, gate: HardSigmoid { alpha: 0.3, beta: 0.4 }, candidate: Softsign }),
            ),
            plain("indrnn", two(Cell::IndRnn { activation: Relu })),
            plain("slstm", two(Cell::SLstm)),
            plain("min gru", two(Cell::MinGru)),
            plain("min lstm", two(Cell::MinLstm)),
            masks("rnn, masks", Cell::RNN),
            masks("lstm, masks", Cell::LSTM),
            masks("gru, masks", Cell::GRU),
            masks("gru before, masks", before),
            masks("indrnn, masks", Cell::IndRnn { activation: Tanh }),
            masks("slstm, masks", Cell::SLstm),
            masks("min gru, masks", Cell::MinGru),
            masks("min lstm, masks", Cell::MinLstm),
            clipped("rnn, clip", Cell::RNN),
            clipped("lstm, clip", everything),
            clipped("gru, clip", Cell::GRU),
            clipped("gru before, clip", before),
            clipped("indrnn, clip", Cell::IndRnn { activation: Tanh }),
            clipped("slstm, clip", Cell::SLstm),
            clipped("min gru, clip", Cell::MinGru),
            clipped("min lstm, clip", Cell::MinLstm),
            projected("rnn, projection", Cell::RNN),
            projected("lstm, projection", everything),
            projected("slstm, projection", Cell::SLstm),
            normalized("lstm, norm", Cell::LSTM),
            normalized("lstm of everything, norm, projection", everything).with(|spec| spec.projection = Some(1)),
            normalized("gru, norm", Cell::GRU),
            reverse("rnn, reverse", Cell::RNN),
            reverse("lstm, reverse", Cell::LSTM),
            reverse("gru, reverse", Cell::GRU),
            masks("sum, residual", Cell::LSTM).with(|spec| (spec.merge, spec.residual, spec.input) = (Merge::Sum, true, 2)),
            masks("mean", Cell::GRU).with(|spec| spec.merge = Merge::Mean),
            masks("product", Cell::RNN).with(|spec| spec.merge = Merge::Product),
            masks("residual", Cell::MinGru).with(|spec| (spec.residual, spec.input) = (true, 4)),
            projected("residual, projection", Cell::LSTM).with(|spec| spec.residual = true),
            teacher("rnn, teacher", Cell::RNN),
            teacher("lstm, teacher", Cell::LSTM),
            teacher("gru, teacher", Cell::GRU),
        ]
    }

    impl Case {
        fn new(name: &'static str, spec: Recurrent) -> Self {
            Self {
                name,
                spec,
                steps: 4,
                lengths: Some(&[2, 0, 4, 1]),
                dropout: false,
                zoneout: false,
                recurrent_masks: false,
                teacher: false,
            }
        }

        fn with<T>(mut self, change: impl FnOnce(&mut Recurrent) -> T) -> Self {
            change(&mut self.spec);
            self
        }
    }

    /// Random values for everything that a case takes.
    struct Given {
        case: Case,
        weights: Vec<Weights>,
        x: Vec<f64>,
        state: Vec<Vec<f64>>,
        masks: Vec<Vec<f64>>,
        zoneout: Vec<Vec<f64>>,
        recurrent_masks: Vec<Vec<f64>>,
        targets: Vec<f64>,
        flags: Vec<bool>,
        dy: Vec<f64>,
        dstate: Vec<Vec<f64>>,
    }

    impl Given {
        const BATCH: usize = 4;

        fn new(case: Case, numbers: &mut Numbers) -> Self {
            let Case { spec, steps, .. } = case;
            let (lines, slots, widths) = (steps * Self::BATCH, spec.layers * spec.directions, spec.state_widths());
            let weights = (0..slots).map(|slot| {
                let parts = spec.parts(slot / spec.directions).into_iter();
                parts.map(|(name, len)| (name.to_owned(), numbers.vec(len))).collect()
            });
            let weights = weights.collect();
            let mut state: Vec<Vec<f64>> = widths.iter().map(|width| numbers.vec(slots * Self::BATCH * width)).collect();
            if spec.cell == Cell::SLstm {
                state[2].iter_mut().for_each(|n| *n = 0.5 + n.abs()); // a sum of exponentials
            }
            let drop = |value: f64| if value < -0.5 { 0.0 } else { 4.0 / 3.0 };
            let mut masks = |given: bool, count: usize, len: usize| -> Vec<Vec<f64>> {
                (0..count).filter(|_| given).map(|_| numbers.vec(len).into_iter().map(drop).collect()).collect()
            };
            let y_len = lines * spec.width();
            let between = masks(case.dropout, spec.layers - 1, y_len);
            let recurrent_masks = masks(case.recurrent_masks, slots, spec.cell.gates() * Self::BATCH * spec.h_width());
            let zoneout =
                (0..slots).map(|_| numbers.vec(lines * widths.iter().sum::<usize>()).into_iter().map(f64::abs).collect());
            Self {
                case,
                weights,
                zoneout: zoneout.collect(),
                x: numbers.vec(lines * spec.input),
                masks: between,
                recurrent_masks,
                targets: numbers.vec(lines * spec.h_width()),
                flags: numbers.vec(lines).into_iter().map(|n| n > 0.0).collect(),
                dy: numbers.vec(y_len),
                dstate: state.iter().map(|state| numbers.vec(state.len())).collect(),
                state,
            }
        }

        /// The output, and the loss that dy and dstate are gradients of.
        fn run(&self, weights: &[Weights], x: &[f64], state: &[Vec<f64>]) -> (f64, RecurrentOutput) {
            let given = RecurrentInput {
                batch: Self::BATCH,
                x,
                state: &state.iter().map(Vec::as_slice).collect::<Vec<_>>(),
                lengths: self.case.lengths,
                masks: &self.masks,
                zoneout: self.case.zoneout.then_some(&self.zoneout),
                recurrent_masks: &self.recurrent_masks,
                teacher: self.case.teacher.then_some((&self.targets, &self.flags)),
                dy: &self.dy,
                dstate: &self.dstate.iter().map(Vec::as_slice).collect::<Vec<_>>(),
            };
            let output = self.case.spec.forward_backward(weights, given);
            let last: f64 = output.state.iter().zip(&self.dstate).map(|(s, d)| dot(s, d)).sum();
            (dot(&output.y, &self.dy) + last, output)
        }
    }

    #[test]
    fn recurrent_gradients_are_central_differences() {
        let mut numbers = Numbers(1);
        for case in cases() {
            let given = Given::new(case, &mut numbers);
            let Given { weights, x, state, dstate, .. } = &given;
            let (Case { name, spec, steps, lengths, .. }, batch) = (case, Given::BATCH);
            let (_, output) = given.run(weights, x, state);
            check(&format!("{name}: x"), x, &output.dx, |x| given.run(weights, x, state).0);
            let mut moved = state.clone();
            for s in 0..state.len() {
                check(&format!("{name}: state {s}"), &state[s], &output.dstate[s], |p| {
                    moved[s].copy_from_slice(p);
                    given.run(weights, x, &moved).0
                });
                moved[s].copy_from_slice(&state[s]);
            }
            let mut moved = weights.clone();
            for (slot, parts) in weights.iter().enumerate() {
                assert!(parts.keys().eq(output.dweights[slot].keys()));
                for (part, at) in parts {
                    check(&format!("{name}: {part} of {slot}"), at, &output.dweights[slot][part], |p| {
                        moved[slot].insert(part.clone(), p.to_vec());
                        given.run(&moved, x, state).0
                    });
                    moved[slot].insert(part.clone(), at.clone());
                }
            }

            // Past its end a row outputs zeros and gives no gradient; a row without steps hands its states through.
            for (row, &length) in lengths.unwrap_or_default().iter().enumerate() {
                for n in (length..steps).map(|t| t * batch + row) {
                    assert!(line(&output.y, n, spec.width()).iter().all(|v| *v == 0.0), "{name}");
                    assert!(line(&output.dx, n, spec.input).iter().all(|v| *v == 0.0), "{name}");
                }
                for (s, width) in spec.state_widths().into_iter().enumerate().filter(|_| length == 0) {
                    for n in (0..weights.len()).map(|slot| slot * batch + row) {
                        assert_eq!(line(&output.state[s], n, width), line(&state[s], n, width), "{name}");
                        assert_eq!(line(&output.dstate[s], n, width), line(&dstate[s], n, width), "{name}");
                    }
                }
            }
        }
    }

    /// The states in the middle are the first ones of what follows, and so are their gradients, but for the ways inside a step:
    /// from dy to h, from h to c, and so on.
    #[test]
    fn states_in_the_middle_are_first_states_of_the_rest() {
        let mut numbers = Numbers(4);
        for cell in [Cell::RNN, Cell::GRU, Cell::LSTM, Cell::SLstm, Cell::MinLstm] {
            let spec = Recurrent::new(cell, 3, 2);
            let (steps, cut, block, count) = (5, 2, Given::BATCH * 2, cell.states());
            let given = Given::new(Case { steps, lengths: None, ..Case::new("cut", spec) }, &mut numbers);
            let whole = given.run(&given.weights, &given.x, &given.state).1;
            let middle = |s: usize| &whole.states[0][s][(cut - 1) * block..][..block];
            let rest = spec.forward_backward(
                &given.weights,
                RecurrentInput {
                    batch: Given::BATCH,
                    x: &given.x[cut * Given::BATCH * 3..],
                    state: &(0..count).map(middle).collect::<Vec<_>>(),
                    dy: &given.dy[cut * block..],
                    dstate: &given.dstate.iter().map(Vec::as_slice).collect::<Vec<_>>(),
                    ..RecurrentInput::default()
                },
            );
            assert_eq!(rest.state, whole.state);
            assert_eq!(whole.states[0][0], whole.y);
            for n in 0..block {
                let mut d: Vec<f64> = rest.dstate.iter().map(|d| d[n]).collect();
                d[0] += given.dy[(cut - 1) * block + n];
                let states: Vec<f64> = (0..count).map(|s| middle(s)[n]).collect();
                match (cell, &states[..]) {
                    (Cell::Lstm { .. }, [h, c]) => d[1] += d[0] * (h / c.tanh()) * (1.0 - c.tanh().powi(2)),
                    (Cell::SLstm, [h, c, norm, _]) => {
                        d[1] += d[0] * h / c;
                        d[2] -= d[0] * h / norm;
                        d[3] -= d[1] * c + d[2] * norm;
                    }
                    _ => {}
                }
                for (s, d) in d.into_iter().enumerate() {
                    let error = (whole.dh[0][s][(cut - 1) * block + n] - d).abs();
                    assert!(error <= 1e-13, "{cell:?}: gradient of state {s} off by {error}");
                }
            }
        }
    }

    /// Steps of one unit in plain numbers: x = 1, so that the rows of `weight_ih` are the gates' input parts, and those of
    /// `weight_hh` their factors of h.
    #[test]
    fn steps_by_hand() {
        let sigma = sigmoid;
        let (gates, u) = ([0.3, -0.4, 0.8, 0.5], [0.6, -0.7, 0.2, 0.9]);
        let states = [0.5, -0.25, 1.5, 0.1];
        let [h, c, n, m] = states;
        let peepholes = [0.15, -0.35, 0.45];
        let [i, f, o] = [0, 1, 3].map(|g| sigma(gates[g] + u[g] * h));
        let g = (gates[2] + u[2] * h).tanh();
        let next = f * c + i * g;
        let lstm = |peepholes, coupled, cell_clip| match Cell::LSTM {
            Cell::Lstm { gate, candidate, output, .. } => Cell::Lstm { gate, candidate, output, peepholes, coupled, cell_clip },
            other => other,
        };
        let gru = |reset| Cell::Gru { reset, gate: Activation::Sigmoid, candidate: Activation::Tanh };
        // r, z, n of a GRU; h has a bias b in the candidate's recurrent part.
        let [r, z] = [0, 1].map(|g| sigma(gates[g] + u[g] * h));
        let b = 0.7;
        let [after, before] = [gates[2] + r * (u[2] * h + b), gates[2] + u[2] * (r * h) + b].map(f64::tanh);
        let [pi, pf] = [sigma(gates[0] + u[0] * h + 0.15 * c), sigma(gates[1] + u[1] * h - 0.35 * c)];
        let pc = pf * c + pi * g;
        let po = sigma(gates[3] + u[3] * h + 0.45 * pc);
        let coupled = (1.0 - i) * c + i * g;
        // i, f, z, o of an sLSTM, without its stabilizer: c and n stand for c e^m and n e^m.
        let (si, sf) = ((gates[0] + u[0] * h).exp(), sigma(gates[1] + u[1] * h));
        let (sc, sn) = (sf * c * m.exp() + si * g, sf * n * m.exp() + si);
        let sm = (sf.ln() + m).max(gates[0] + u[0] * h);
        let (mf, mi) = (sigma(gates[0]), sigma(gates[1]));
        let cases: [(Cell, Vec<f64>); 11] = [
            (Cell::RNN, vec![(0.3f64 + 0.6 * 0.5).tanh()]),
            (Cell::IndRnn { activation: Activation::Softsign }, vec![0.6 / 1.6]),
            (lstm(false, false, None), vec![o * next.tanh(), next]),
            (lstm(false, true, None), vec![o * coupled.tanh(), coupled]),
            (lstm(true, false, None), vec![po * pc.tanh(), pc]),
            (lstm(false, false, Some(0.25)), vec![o * 0.25f64.tanh(), 0.25]),
            (gru(Reset::After), vec![(1.0 - z) * after + z * h]),
            (gru(Reset::Before), vec![(1.0 - z) * before + z * h]),
            (Cell::SLstm, vec![o * sc / sn, sc / sm.exp(), sn / sm.exp(), sm]),
            (Cell::MinGru, vec![(1.0 - mf) * h + mf * sigma(-0.4)]),
            (Cell::MinLstm, vec![(mf * h + mi * 1.3) / (mf + mi)]),
        ];
        assert!(next > 0.25, "the clip acts");
        for (cell, expected) in cases {
            let spec = Recurrent::new(cell, 1, 1);
            let mut weights: Weights = spec.parts(0).into_iter().map(|(name, len)| (name.to_owned(), vec![0.0; len])).collect();
            let given = [("weight_ih", &gates[..]), ("weight_hh", &u), ("weight_peephole", &peepholes)];
            for (name, values) in given {
                if let Some(part) = weights.get_mut(name) {
                    let len = part.len();
                    part.copy_from_slice(&values[..len]);
                }
            }
            if let Cell::Gru { .. } = cell {
                weights.insert("bias_hh".into(), vec![0.0, 0.0, b]);
            }
            let state: Vec<&[f64]> = states.chunks(1).take(cell.states()).collect();
            let given = RecurrentInput { batch: 1, x: &[1.0], state: &state, ..RecurrentInput::default() };
            let output = spec.forward_backward(&[weights], given);
            for (s, expected) in expected.into_iter().enumerate() {
                let error = (output.state[s][0] - expected).abs();
                assert!(error <= 1e-15, "{cell:?}: state {s} is {:?}, not {expected}", output.state[s]);
            }
        }
    }

    /// Layer normalization against Ba et al.'s formulas with means and variances spelled out.
    #[test]
    fn layer_norm_by_hand() {
        let normal = |v: &[f64], gain: &[f64]| -> Vec<f64> {
            let mean = v.iter().sum::<f64>() / v.len() as f64;
            let variance = v.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / v.len() as f64;
            v.iter().zip(gain).map(|(v, gain)| gain * (v - mean) / (variance + 1e-5).sqrt()).collect()
        };
        let mut numbers = Numbers(5);
        for cell in [Cell::LSTM, Cell::GRU] {
            let spec = Recurrent { layer_norm: true, ..Recurrent::new(cell, 3, 2) };
            let weights: Weights = spec.parts(0).into_iter().map(|(name, len)| (name.to_owned(), numbers.vec(len))).collect();
            let (x, h, c) = (numbers.vec(3), numbers.vec(2), numbers.vec(2));
            let (wx, wh) = (
                linear(&x, &weights["weight_ih"], None, 3, 2 * cell.gates()),
                linear(&h, &weights["weight_hh"], None, 2, 2 * cell.gates()),
            );
            let (gx, gh, bx, bh) = (&weights["norm_ih"], &weights["norm_hh"], &weights["bias_ih"], &weights["bias_hh"]);
            let expected: [f64; 2] = match cell {
                Cell::Gru { .. } => {
                    let x = [normal(&wx[..4], &gx[..4]), normal(&wx[4..], &gx[4..])].concat();
                    let r = [normal(&wh[..4], &gh[..4]), normal(&wh[4..], &gh[4..])].concat();
                    let gate = |n: usize| sigmoid(x[n] + bx[n] + r[n] + bh[n]);
                    from_fn(|j| {
                        let candidate = (x[4 + j] + bx[4 + j] + gate(j) * (r[4 + j] + bh[4 + j])).tanh();
                        (1.0 - gate(2 + j)) * candidate + gate(2 + j) * h[j]
                    })
                }
                _ => {
                    let (x, r) = (normal(&wx, gx), normal(&wh, gh));
                    let sum = |n: usize| x[n] + bx[n] + r[n] + bh[n];
                    let c: [f64; 2] = from_fn(|j| sigmoid(sum(2 + j)) * c[j] + sigmoid(sum(j)) * sum(4 + j).tanh());
                    let normal_c = normal(&c, &weights["norm_c"]);
                    from_fn(|j| sigmoid(sum(6 + j)) * (normal_c[j] + weights["norm_c_bias"][j]).tanh())
                }
            };
            let state: Vec<&[f64]> = [&h[..], &c].into_iter().take(cell.states()).collect();
            let given = RecurrentInput { batch: 1, x: &x, state: &state, ..RecurrentInput::default() };
            let y = spec.forward_backward(&[weights], given).y;
            assert!(y.iter().zip(expected).all(|(y, expected)| (y - expected).abs() <= 1e-15), "{y:?}, not {expected:?}");
        }
    }

    /// Each option against the layer without it.
    #[test]
    fn options_by_hand() {
        let mut numbers = Numbers(6);
        let (batch, steps) = (2, 3);
        let make = |spec: &Recurrent, numbers: &mut Numbers| -> Vec<Weights> {
            let part = |(name, len): (&str, usize)| (name.to_owned(), numbers.vec(len));
            let mut part = part;
            (0..spec.layers * spec.directions)
                .map(|slot| spec.parts(slot / spec.directions).into_iter().map(&mut part).collect())
                .collect()
        };
        let x = numbers.vec(steps * batch * 2);
        let given = RecurrentInput { batch, x: &x, ..RecurrentInput::default() };
        let both = Recurrent { directions: 2, ..Recurrent::new(Cell::GRU, 2, 2) };
        let weights = make(&both, &mut numbers);
        let concat = both.forward_backward(&weights, given).y;

        // The second direction is a reverse layer of its own.
        let one = |weights, first_reverse| {
            Recurrent { first_reverse, ..Recurrent::new(Cell::GRU, 2, 2) }.forward_backward(weights, given).y
        };
        let (forward, reverse) = (one(&weights[..1], false), one(&weights[1..], true));
        let pairs: Vec<f64> =
            forward.chunks(2).zip(reverse.chunks(2)).flat_map(|(forward, reverse)| [forward, reverse].concat()).collect();
        assert_eq!(concat, pairs);
        type Pair = fn(f64, f64) -> f64;
        let merges: [(Merge, Pair); 3] =
            [(Merge::Sum, |a, b| a + b), (Merge::Mean, |a, b| (a + b) * 0.5), (Merge::Product, |a, b| a * b)];
        for (merge, of) in merges {
            let expected: Vec<f64> = forward.iter().zip(&reverse).map(|(a, b)| of(*a, *b)).collect();
            let y = Recurrent { merge, ..both }.forward_backward(&weights, given).y;
            assert_eq!(y, expected, "{merge:?}");
            let y = Recurrent { merge, residual: true, ..both }.forward_backward(&weights, given).y;
            assert_eq!(y, x.iter().zip(&expected).map(|(x, y)| x + y).collect::<Vec<_>>(), "{merge:?}, residual");
        }

        // Zoneout of 1 keeps the state, of 0 changes nothing. A mask of zeros is a layer without recurrent products.
        let state = numbers.vec(batch * 2);
        let spec = Recurrent::new(Cell::GRU, 2, 2);
        let given = RecurrentInput { state: &[&state], ..given };
        let free = spec.forward_backward(&weights[..1], given).y;
        let zoned = |k: f64| {
            let zoneout = [vec![k; steps * batch * 2]];
            spec.forward_backward(&weights[..1], RecurrentInput { zoneout: Some(&zoneout), ..given }).y
        };
        assert_eq!(zoned(0.0), free);
        assert_eq!(zoned(1.0), state.repeat(steps));
        let quarter = zoned(0.25);
        let before = [&state[..], &quarter].concat();
        for (t, previous) in before.chunks(batch * 2).take(steps).enumerate() {
            let one = RecurrentInput { x: line(&x, t, batch * 2), state: &[previous], ..given };
            let new = spec.forward_backward(&weights[..1], one).y;
            let expected: Vec<f64> = previous.iter().zip(new).map(|(previous, new)| 0.25 * previous + 0.75 * new).collect();
            assert_eq!(line(&quarter, t, batch * 2), expected);
        }
        let masked =
            spec.forward_backward(&weights[..1], RecurrentInput { recurrent_masks: &[vec![0.0; 3 * batch * 2]], ..given }).y;
        let mut unconnected = weights[0].clone();
        unconnected.insert("weight_hh".into(), vec![0.0; 6 * 2]);
        assert_eq!(masked, spec.forward_backward(&[unconnected], given).y);

        // A reset gate before the product acts on what the product takes, not on what it gives.
        let cell = Cell::Gru { reset: Reset::Before, gate: Activation::Sigmoid, candidate: Activation::Tanh };
        let w = &weights[0];
        let y = Recurrent { cell, ..spec }.forward_backward(&weights[..1], RecurrentInput { x: &x[..batch * 2], ..given }).y;
        for (row, (x, h)) in x.chunks(2).zip(state.chunks(2)).enumerate() {
            let (x, u) =
                (linear(x, &w["weight_ih"], Some(&w["bias_ih"]), 2, 6), linear(h, &w["weight_hh"], Some(&w["bias_hh"]), 2, 6));
            let reset: [f64; 2] = from_fn(|j| sigmoid(x[j] + u[j]) * h[j]);
            let u_n = linear(&reset, &w["weight_hh"][4 * 2..], Some(&w["bias_hh"][4..]), 2, 2);
            for j in 0..2 {
                let z = sigmoid(x[2 + j] + u[2 + j]);
                let expected = (1.0 - z) * (x[4 + j] + u_n[j]).tanh() + z * h[j];
                assert!((y[row * 2 + j] - expected).abs() <= 1e-15);
            }
        }

        // With its own outputs as targets a layer does what it does anyway; other targets are other previous states.
        let teach = |targets: &[f64]| {
            spec.forward_backward(&weights[..1], RecurrentInput { teacher: Some((targets, &[true; 6])), ..given }).y
        };
        assert_eq!(teach(&free), free);
        let targets = numbers.vec(steps * batch * 2);
        let last = RecurrentInput { x: &x[2 * batch * 2..], state: &[&targets[batch * 2..2 * batch * 2]], ..given };
        assert_eq!(teach(&targets)[2 * batch * 2..], spec.forward_backward(&weights[..1], last).y);
        assert_eq!(teach(&targets)[..batch * 2], free[..batch * 2]);

        // A clip of the pre-activations is the same as hard bounds of the activation: an RNN with the identity in place of tanh.
        let identity = Cell::Rnn { activation: Activation::Affine { alpha: 1.0, beta: 0.0 } };
        let spec = Recurrent { pre_clip: Some(0.5), ..Recurrent::new(identity, 2, 2) };
        let weights = make(&spec, &mut numbers);
        let clipped = spec.forward_backward(&weights, given).y;
        let hard = Cell::Rnn { activation: Activation::HardSigmoid { alpha: 1.0, beta: 0.5 } };
        let mut shifted = weights.clone();
        let spec = Recurrent::new(hard, 2, 2);
        // h + 1/2 is the state there.
        let sums: Vec<f64> = weights[0]["weight_hh"].chunks(2).map(|row| 0.5 * (row[0] + row[1])).collect();
        shifted[0].insert("bias_hh".into(), weights[0]["bias_hh"].iter().zip(sums).map(|(b, sum)| b - sum).collect());
        let state: Vec<f64> = state.iter().map(|h| h + 0.5).collect();
        let y = spec.forward_backward(&shifted, RecurrentInput { state: &[&state], ..given }).y;
        assert!(clipped.iter().any(|v| v.abs() == 0.5) && clipped.iter().any(|v| v.abs() < 0.5));
        assert!(y.iter().zip(&clipped).all(|(y, clipped)| (y - 0.5 - clipped).abs() <= 1e-15));
    }

    #[test]
    fn products_by_hand_and_by_differences() {
        let (a, b) = ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 0.0, 2.0, 1.0, 0.0, 3.0]);
        let expected = [5.0, 11.0, 14.0, 23.0]; // [1 2 3; 4 5 6] [1 0; 2 1; 0 3]
        assert_eq!(matmul(&a, &b, 2, 2, 3, false, false), expected);
        assert_eq!(matmul(&[1.0, 4.0, 2.0, 5.0, 3.0, 6.0], &b, 2, 2, 3, true, false), expected);
        assert_eq!(matmul(&a, &[1.0, 2.0, 0.0, 0.0, 1.0, 3.0], 2, 2, 3, false, true), expected);

        let mut numbers = Numbers(2);
        let (x, w, b, dy) = (numbers.vec(4 * 3), numbers.vec(2 * 3), numbers.vec(2), numbers.vec(4 * 2));
        assert_eq!(linear(&[1.0, 2.0], &[3.0, 4.0], Some(&[5.0]), 2, 1), [16.0]);
        let g = linear_backward(&x, &w, &dy, 3, 2);
        check("linear x", &x, &g.dx, |x| dot(&linear(x, &w, Some(&b), 3, 2), &dy));
        check("linear weight", &w, &g.dweight, |w| dot(&linear(&x, w, Some(&b), 3, 2), &dy));
        check("linear bias", &b, &g.dbias, |b| dot(&linear(&x, &w, Some(b), 3, 2), &dy));

        let (ids, table, dy) = ([2, 0, 2, 3], numbers.vec(5 * 3), numbers.vec(4 * 3));
        assert_eq!(embedding(&ids, &table, 3)[6..9], table[6..9]);
        check("embedding", &table, &embedding_backward(&ids, &dy, 5, 3), |table| dot(&embedding(&ids, table, 3), &dy));
    }

    #[test]
    fn losses_by_hand_and_by_differences() {
        let mut numbers = Numbers(3);
        let (logits, targets) = (numbers.vec(5 * 4), [3, 0, 1, 0, 2]);
        for ignored in [None, Some(0)] {
            let (_, d) = cross_entropy(&logits, 4, &targets, ignored);
            check("cross_entropy", &logits, &d, |logits| cross_entropy(logits, 4, &targets, ignored).0);
        }
        // Equal logits: log V. A line that is ignored changes nothing. Huge logits do not overflow.
        assert!((cross_entropy(&[3.0; 4], 4, &[1], None).0 - 4f64.ln()).abs() <= 1e-15);
        assert!((cross_entropy(&[3.0, 3.0, 9.0, -9.0], 2, &[1, 0], Some(0)).0 - 2f64.ln()).abs() <= 1e-15);
        assert_eq!(cross_entropy(&[1e4, 0.0], 2, &[1], None), (1e4, vec![1.0, -1.0]));
        assert!(cross_entropy(&[1.0, 2.0], 2, &[0], Some(0)).0.is_nan());

        let (p, t, counted) = (numbers.vec(4), numbers.vec(4), [true, false, true, true]);
        check("mse", &p, &mean_squared_error(&p, &t, &counted).1, |p| mean_squared_error(p, &t, &counted).0);
        assert_eq!(mean_squared_error(&[1.0, 5.0, 2.0], &[0.0, 0.0, 4.0], &[true, false, true]), (2.5, vec![1.0, 0.0, -2.0]));
    }

    #[test]
    fn optimizers_by_hand() {
        assert_eq!(global_norm(&[&[3.0], &[0.0, 4.0]]), 5.0);
        assert_eq!((clip_factor(5.0, 10.0), clip_factor(4.0 - 1e-6, 1.0)), (1.0, 0.25));

        let sgd = Sgd { lr: 0.5, momentum: 0.5, weight_decay: 0.25 };
        let (mut p, mut velocity) = ([2.0], [0.0]);
        sgd.step(&mut p, &[1.0], &mut velocity); // d = 1 + 0.5, m = 1.5
        assert_eq!((p, velocity), ([1.25], [1.5]));
        sgd.step(&mut p, &[1.0], &mut velocity); // d = 1.3125, m = 0.75 + 1.3125
        assert_eq!((p, velocity), ([0.21875], [2.0625]));

        // Whatever the gradient's size, the first step goes lr along its sign, after the decay.
        let adamw = AdamW { lr: 0.125, beta1: 0.9, beta2: 0.999, epsilon: 0.0, weight_decay: 0.5 };
        let (mut p, mut mean, mut square) = ([2.0, 2.0], [0.0; 2], [0.0; 2]);
        adamw.step(&mut p, &[1e-3, -7.0], &mut mean, &mut square, 1);
        assert!(p.iter().zip([1.75, 2.0]).all(|(p, expected)| (p - expected).abs() <= 1e-14), "{p:?}");
    }
}
