//! The textbook, in f64: what every kernel, layer, loss and optimizer must compute.
//!
//! This file shares no code with the rest of the crate and aims at being obviously right, not fast. Tensors are row-major `f64`
//! slices in time-major layouts; sizes are T steps, B rows, I inputs, H hidden, L layers, D directions, G gates, S states.
//! Slices of the wrong length panic: callers are tests. Gradients are checked by central differences here and against PyTorch's
//! in `case_file`.

/// The logistic function `1 / (1 + e^-x)`.
pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

// ---- recurrent layers ----

/// The equations of one unit of a recurrent layer, for one row and one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cell {
    /// Long short-term memory as in PyTorch; gates in the order i, f, g, o, states h, c:
    ///
    /// ```text
    /// i, f, o = sigmoid(x + r)    g = tanh(x + r)    c' = f c + i g    h' = o tanh(c')
    /// ```
    Lstm,
}

/// Gradients of one unit's step by everything that [`Cell::forward`] takes.
pub struct UnitGradients {
    /// By the gates' input parts \[G\].
    pub x: Vec<f64>,
    /// By the gates' recurrent parts \[G\].
    pub r: Vec<f64>,
    /// By the previous states \[S\], directly: without the way through `r`.
    pub previous: Vec<f64>,
}

impl Cell {
    /// G, the number of gates.
    pub fn gates(self) -> usize {
        match self {
            Cell::Lstm => 4,
        }
    }

    /// S, the number of states; state 0 is h.
    pub fn states(self) -> usize {
        match self {
            Cell::Lstm => 2,
        }
    }

    /// The next states \[S\] from the input parts `x` \[G\], the recurrent parts `r` \[G\] and the previous states \[S\].
    pub fn forward(self, x: &[f64], r: &[f64], previous: &[f64]) -> Vec<f64> {
        match self {
            Cell::Lstm => {
                let [i, f, g, o] = lstm_gates(x, r);
                let c = f * previous[1] + i * g;
                vec![o * c.tanh(), c]
            }
        }
    }

    /// Gradients of the step, from `d` \[S\], the gradients by its next states.
    pub fn backward(self, x: &[f64], r: &[f64], previous: &[f64], d: &[f64]) -> UnitGradients {
        match self {
            Cell::Lstm => {
                let [i, f, g, o] = lstm_gates(x, r);
                let tanh_c = (f * previous[1] + i * g).tanh();
                let dc = d[1] + d[0] * o * (1.0 - tanh_c * tanh_c);
                let dgates = vec![
                    dc * g * i * (1.0 - i),
                    dc * previous[1] * f * (1.0 - f),
                    dc * i * (1.0 - g * g),
                    d[0] * tanh_c * o * (1.0 - o),
                ];
                UnitGradients { x: dgates.clone(), r: dgates, previous: vec![0.0, dc * f] }
            }
        }
    }
}

fn lstm_gates(x: &[f64], r: &[f64]) -> [f64; 4] {
    [sigmoid(x[0] + r[0]), sigmoid(x[1] + r[1]), (x[2] + r[2]).tanh(), sigmoid(x[3] + r[3])]
}

/// A stack of recurrent layers.
#[derive(Clone, Copy, Debug)]
pub struct Recurrent {
    /// The equations of a unit.
    pub cell: Cell,
    /// I, the width of the input of layer 0. The other layers take D*H values.
    pub input: usize,
    /// H.
    pub hidden: usize,
    /// L.
    pub layers: usize,
    /// D: 1 forward, 2 forward and reverse.
    pub directions: usize,
    /// Whether there are bias vectors.
    pub bias: bool,
}

/// The weights of one layer and direction, or gradients by them. Row `g*H + j` belongs to gate g of unit j.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Weights {
    /// \[G*H, I\] in layer 0, \[G*H, D*H\] in the others.
    pub weight_ih: Vec<f64>,
    /// \[G*H, H\].
    pub weight_hh: Vec<f64>,
    /// \[G*H\], or empty without bias.
    pub bias_ih: Vec<f64>,
    /// \[G*H\], or empty without bias.
    pub bias_hh: Vec<f64>,
}

/// What [`Recurrent::forward_backward`] takes.
#[derive(Clone, Copy, Debug)]
pub struct RecurrentInput<'a> {
    /// B.
    pub batch: usize,
    /// \[T,B,I\].
    pub x: &'a [f64],
    /// The initial states, S of \[L*D,B,H\]: for LSTM h0, c0.
    pub state: &'a [&'a [f64]],
    /// How many steps each row has \[B\], 0 to T; without it T in every row.
    pub lengths: Option<&'a [usize]>,
    /// Dropout between the layers: what multiplies the output of each layer but the last, L-1 of \[T,B,D*H\]; empty for none.
    pub masks: &'a [Vec<f64>],
    /// The loss's gradient by y \[T,B,D*H\].
    pub dy: &'a [f64],
    /// The loss's gradient by the final states, S of \[L*D,B,H\].
    pub dstate: &'a [&'a [f64]],
}

/// What [`Recurrent::forward_backward`] gives.
#[derive(Clone, Debug)]
pub struct RecurrentOutput {
    /// The last layer's h at every step \[T,B,D*H\], zero past a row's length.
    pub y: Vec<f64>,
    /// The states after each row's last processed step, S of \[L*D,B,H\]: for LSTM hn, cn.
    pub state: Vec<Vec<f64>>,
    /// The gradient by x \[T,B,I\].
    pub dx: Vec<f64>,
    /// The gradients by the initial states, S of \[L*D,B,H\].
    pub dstate: Vec<Vec<f64>>,
    /// The gradients by the weights of each layer and direction, at `layer*D + direction`.
    pub dweights: Vec<Weights>,
}

/// One step of one row, kept for the backward pass: the gates' parts and the states before it.
struct Step {
    t: usize,
    x: Vec<f64>,
    r: Vec<f64>,
    previous: Vec<Vec<f64>>,
}

impl Recurrent {
    /// Runs the stack over a batch and back. A row of length n sees its steps 0, 1, .., n-1, and in the reverse direction
    /// n-1, .., 1, 0; a row of length 0 returns its initial states. `weights` lie at `layer*D + direction`.
    pub fn forward_backward(&self, weights: &[Weights], input: RecurrentInput<'_>) -> RecurrentOutput {
        let (batch, hidden, directions) = (input.batch, self.hidden, self.directions);
        let steps = input.dy.len() / (batch * directions * hidden);
        assert_eq!(input.dy.len(), steps * batch * directions * hidden);
        assert_eq!(input.x.len(), steps * batch * self.input);
        assert_eq!((input.state.len(), input.dstate.len()), (self.cell.states(), self.cell.states()));
        for state in input.state.iter().chain(input.dstate) {
            assert_eq!(state.len(), self.layers * directions * batch * hidden);
        }
        assert!(input.masks.is_empty() || input.masks.len() == self.layers - 1);
        assert!(input.lengths.is_none_or(|lengths| lengths.len() == batch && lengths.iter().all(|&n| n <= steps)));

        // Forward, layer by layer. inputs[l] is what layer l takes; tapes[(l*D + d)*B + b] holds the steps of one row in the
        // order in which it saw them.
        let mut inputs = vec![input.x.to_vec()];
        let mut state: Vec<Vec<f64>> = input.state.iter().map(|s| s.to_vec()).collect();
        let mut tapes: Vec<Vec<Step>> = Vec::new();
        for layer in 0..self.layers {
            let mut y = vec![0.0; input.dy.len()];
            for direction in 0..directions {
                let slot = layer * directions + direction;
                for row in 0..batch {
                    let length = input.lengths.map_or(steps, |lengths| lengths[row]);
                    let mut order: Vec<usize> = (0..length).collect();
                    if direction == 1 {
                        order.reverse();
                    }
                    let place = (slot * batch + row) * hidden;
                    let mut now: Vec<Vec<f64>> = state.iter().map(|s| s[place..place + hidden].to_vec()).collect();
                    let mut tape = Vec::new();
                    for t in order {
                        let (step, next) = self.step(&weights[slot], self.vector(&inputs[layer], layer, t * batch + row), now, t);
                        let at = (t * batch + row) * directions * hidden + direction * hidden;
                        y[at..at + hidden].copy_from_slice(&next[0]);
                        tape.push(step);
                        now = next;
                    }
                    for (all, last) in state.iter_mut().zip(&now) {
                        all[place..place + hidden].copy_from_slice(last);
                    }
                    tapes.push(tape);
                }
            }
            if layer + 1 < self.layers && !input.masks.is_empty() {
                y = multiply(&y, &input.masks[layer]);
            }
            inputs.push(y);
        }

        // Backward, everything in the opposite order. dy is the gradient by the current layer's output.
        let mut dy = input.dy.to_vec();
        let mut dstate: Vec<Vec<f64>> = input.dstate.iter().map(|s| s.to_vec()).collect();
        let mut dweights: Vec<Weights> = weights.iter().map(zeros_like).collect();
        for layer in (0..self.layers).rev() {
            let mut dx = vec![0.0; inputs[layer].len()];
            for direction in 0..directions {
                let slot = layer * directions + direction;
                for row in 0..batch {
                    let place = (slot * batch + row) * hidden;
                    let mut d: Vec<Vec<f64>> = dstate.iter().map(|s| s[place..place + hidden].to_vec()).collect();
                    for step in tapes[slot * batch + row].iter().rev() {
                        let line = step.t * batch + row;
                        let at = line * directions * hidden + direction * hidden;
                        add(&mut d[0], &dy[at..at + hidden]);
                        let x = self.vector(&inputs[layer], layer, line);
                        let (dx_step, dprevious) = self.step_backward(&weights[slot], x, step, &d, &mut dweights[slot]);
                        add(&mut dx[line * x.len()..][..x.len()], &dx_step);
                        d = dprevious;
                    }
                    for (all, first) in dstate.iter_mut().zip(&d) {
                        all[place..place + hidden].copy_from_slice(first);
                    }
                }
            }
            if layer > 0 && !input.masks.is_empty() {
                dx = multiply(&dx, &input.masks[layer - 1]);
            }
            dy = dx;
        }
        RecurrentOutput { y: inputs.remove(self.layers), state, dx: dy, dstate, dweights }
    }

    /// Line `line` = t*B + row of the input of `layer`.
    fn vector<'a>(&self, inputs: &'a [f64], layer: usize, line: usize) -> &'a [f64] {
        let width = if layer == 0 { self.input } else { self.directions * self.hidden };
        &inputs[line * width..(line + 1) * width]
    }

    /// One row, one step: `x W_ih^T + b_ih` and `h W_hh^T + b_hh`, then the cell, unit by unit. Gives the next states too,
    /// S of \[H\].
    fn step(&self, w: &Weights, x: &[f64], previous: Vec<Vec<f64>>, t: usize) -> (Step, Vec<Vec<f64>>) {
        let outputs = self.cell.gates() * self.hidden;
        let mut step = Step {
            t,
            x: linear(x, &w.weight_ih, self.bias.then_some(&w.bias_ih[..]), x.len(), outputs),
            r: linear(&previous[0], &w.weight_hh, self.bias.then_some(&w.bias_hh[..]), self.hidden, outputs),
            previous: Vec::new(),
        };
        let mut next = previous.clone();
        for unit in 0..self.hidden {
            let states: Vec<f64> = previous.iter().map(|s| s[unit]).collect();
            let new = self.cell.forward(&self.gates_of(&step.x, unit), &self.gates_of(&step.r, unit), &states);
            for (all, value) in next.iter_mut().zip(new) {
                all[unit] = value;
            }
        }
        step.previous = previous;
        (step, next)
    }

    /// The gradients of one step by x and by the previous states, from `d`, those by the next states; adds those by the weights.
    fn step_backward(&self, w: &Weights, x: &[f64], step: &Step, d: &[Vec<f64>], dw: &mut Weights) -> (Vec<f64>, Vec<Vec<f64>>) {
        let hidden = self.hidden;
        let (mut dx_part, mut dr_part) = (vec![0.0; step.x.len()], vec![0.0; step.r.len()]);
        let mut dprevious = vec![vec![0.0; hidden]; d.len()];
        for unit in 0..hidden {
            let states: Vec<f64> = step.previous.iter().map(|s| s[unit]).collect();
            let dstates: Vec<f64> = d.iter().map(|s| s[unit]).collect();
            let (x, r) = (self.gates_of(&step.x, unit), self.gates_of(&step.r, unit));
            let gradients = self.cell.backward(&x, &r, &states, &dstates);
            for gate in 0..self.cell.gates() {
                dx_part[gate * hidden + unit] = gradients.x[gate];
                dr_part[gate * hidden + unit] = gradients.r[gate];
            }
            for (all, value) in dprevious.iter_mut().zip(gradients.previous) {
                all[unit] = value;
            }
        }
        let by_input = linear_backward(x, &w.weight_ih, &dx_part, x.len(), dx_part.len());
        let by_h = linear_backward(&step.previous[0], &w.weight_hh, &dr_part, hidden, dr_part.len());
        add(&mut dw.weight_ih, &by_input.dweight);
        add(&mut dw.weight_hh, &by_h.dweight);
        if self.bias {
            add(&mut dw.bias_ih, &by_input.dbias);
            add(&mut dw.bias_hh, &by_h.dbias);
        }
        add(&mut dprevious[0], &by_h.dx);
        (by_input.dx, dprevious)
    }

    /// The G values of one unit out of \[G*H\].
    fn gates_of(&self, values: &[f64], unit: usize) -> Vec<f64> {
        (0..self.cell.gates()).map(|gate| values[gate * self.hidden + unit]).collect()
    }
}

fn zeros_like(w: &Weights) -> Weights {
    let zeros = |v: &Vec<f64>| vec![0.0; v.len()];
    Weights {
        weight_ih: zeros(&w.weight_ih),
        weight_hh: zeros(&w.weight_hh),
        bias_ih: zeros(&w.bias_ih),
        bias_hh: zeros(&w.bias_hh),
    }
}

fn add(sum: &mut [f64], terms: &[f64]) {
    assert_eq!(sum.len(), terms.len());
    for (sum, term) in sum.iter_mut().zip(terms) {
        *sum += term;
    }
}

fn multiply(a: &[f64], b: &[f64]) -> Vec<f64> {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).collect()
}

// ---- products ----

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

    /// Compares `gradient` with `(f(p + e) - f(p - e)) / 2e` in every coordinate of `at`.
    fn check(what: &str, at: &[f64], gradient: &[f64], mut f: impl FnMut(&[f64]) -> f64) {
        assert_eq!(at.len(), gradient.len(), "{what}");
        let e = 1e-5;
        let mut p = at.to_vec();
        for n in 0..at.len() {
            p[n] = at[n] + e;
            let above = f(&p);
            p[n] = at[n] - e;
            let difference = (above - f(&p)) / (2.0 * e);
            p[n] = at[n];
            assert!((difference - gradient[n]).abs() <= 1e-8, "{what}[{n}]: {} but differences give {difference}", gradient[n]);
        }
    }

    fn parts(w: &mut Weights) -> [(&'static str, &mut Vec<f64>); 4] {
        [
            ("weight_ih", &mut w.weight_ih),
            ("weight_hh", &mut w.weight_hh),
            ("bias_ih", &mut w.bias_ih),
            ("bias_hh", &mut w.bias_hh),
        ]
    }

    #[test]
    fn recurrent_gradients_are_central_differences() {
        // steps, batch, input, hidden, layers, directions, bias, lengths, dropout
        type Case = (usize, usize, usize, usize, usize, usize, bool, Option<&'static [usize]>, bool);
        let cases: [Case; 5] = [
            (1, 1, 1, 1, 1, 1, true, None, false),
            (4, 2, 3, 2, 1, 1, false, None, false),
            (4, 4, 3, 2, 2, 2, true, Some(&[2, 0, 4, 1]), false),
            (3, 3, 2, 3, 3, 2, true, Some(&[1, 3, 0]), true),
            (3, 2, 2, 3, 2, 1, true, None, true),
        ];
        let mut numbers = Numbers(1);
        for (steps, batch, input, hidden, layers, directions, bias, lengths, dropout) in cases {
            let cell = Cell::Lstm;
            let spec = Recurrent { cell, input, hidden, layers, directions, bias };
            let rows = cell.gates() * hidden;
            let mut weights: Vec<Weights> = (0..layers * directions)
                .map(|slot| Weights {
                    weight_ih: numbers.vec(rows * if slot < directions { input } else { directions * hidden }),
                    weight_hh: numbers.vec(rows * hidden),
                    bias_ih: numbers.vec(if bias { rows } else { 0 }),
                    bias_hh: numbers.vec(if bias { rows } else { 0 }),
                })
                .collect();
            let (y_size, state_size) = (steps * batch * directions * hidden, layers * directions * batch * hidden);
            let x = numbers.vec(steps * batch * input);
            let dy = numbers.vec(y_size);
            let state: Vec<Vec<f64>> = (0..cell.states()).map(|_| numbers.vec(state_size)).collect();
            let dstate: Vec<Vec<f64>> = (0..cell.states()).map(|_| numbers.vec(state_size)).collect();
            let drop = |value: f64| if value < -0.5 { 0.0 } else { 4.0 / 3.0 };
            let masks: Vec<Vec<f64>> =
                (1..layers).filter(|_| dropout).map(|_| numbers.vec(y_size).into_iter().map(drop).collect()).collect();

            let run = |weights: &[Weights], x: &[f64], state: &[Vec<f64>]| {
                let state: Vec<&[f64]> = state.iter().map(Vec::as_slice).collect();
                let dstate: Vec<&[f64]> = dstate.iter().map(Vec::as_slice).collect();
                let given = RecurrentInput { batch, x, state: &state, lengths, masks: &masks, dy: &dy, dstate: &dstate };
                let output = spec.forward_backward(weights, given);
                let last: f64 = output.state.iter().zip(&dstate).map(|(s, d)| dot(s, d)).sum();
                (dot(&output.y, &dy) + last, output)
            };
            let (_, mut output) = run(&weights, &x, &state);
            check("x", &x, &output.dx, |x| run(&weights, x, &state).0);
            for s in 0..state.len() {
                let mut moved = state.clone();
                check("state", &state[s], &output.dstate[s], |p| {
                    moved[s] = p.to_vec();
                    run(&weights, &x, &moved).0
                });
            }
            for slot in 0..weights.len() {
                for part in 0..4 {
                    let at = parts(&mut weights[slot])[part].1.clone();
                    let (name, gradient) = &mut parts(&mut output.dweights[slot])[part];
                    let mut moved = weights.clone();
                    check(name, &at, gradient, |p| {
                        parts(&mut moved[slot])[part].1.copy_from_slice(p);
                        run(&moved, &x, &state).0
                    });
                }
            }

            // Past its end a row outputs zeros and gives no gradient; a row without steps hands its states through.
            for (row, &length) in lengths.unwrap_or_default().iter().enumerate() {
                for line in (length..steps).map(|t| t * batch + row) {
                    let width = directions * hidden;
                    assert!(output.y[line * width..][..width].iter().all(|&v| v == 0.0));
                    assert!(output.dx[line * input..][..input].iter().all(|&v| v == 0.0));
                }
                for slot in (0..layers * directions).filter(|_| length == 0) {
                    let row = (slot * batch + row) * hidden..(slot * batch + row + 1) * hidden;
                    for s in 0..state.len() {
                        assert_eq!(output.state[s][row.clone()], state[s][row.clone()]);
                        assert_eq!(output.dstate[s][row.clone()], dstate[s][row.clone()]);
                    }
                }
            }
        }
    }

    #[test]
    fn lstm_step_by_hand() {
        // All pre-activations 0: i = f = o = 1/2, g = 0, so c' = c/2 and h' = tanh(c/2)/2, whatever h is.
        let next = Cell::Lstm.forward(&[1.0, 2.0, 3.0, 4.0], &[-1.0, -2.0, -3.0, -4.0], &[7.0, 2.0]);
        assert_eq!(next, [0.5 * 1f64.tanh(), 1.0]);
        // Only g open: c' = c/2 + tanh(1)/2.
        let next = Cell::Lstm.forward(&[0.0, 0.0, 1.0, 0.0], &[0.0; 4], &[0.0, 0.0]);
        assert!((next[1] - 0.5 * 0.761_594_155_955_764_9).abs() <= 1e-16);
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
