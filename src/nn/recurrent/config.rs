//! Sizes and options of recurrent layers.

use super::{Cell, Recurrent};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::activation::Activation;
use crate::kernels::cell_contract::Block;
use crate::kernels::cell_gru::GruCell;
use crate::kernels::cell_indrnn::IndRnnCell;
use crate::kernels::cell_lstm::LstmCell;
use crate::kernels::cell_min_gru::MinGruCell;
use crate::kernels::cell_min_lstm::MinLstmCell;
use crate::kernels::cell_rnn::RnnCell;
use crate::kernels::cell_slstm::SLstmCell;
use crate::kernels::half::Precision;
use crate::rng::Rng;

/// Which way a recurrent layer reads its sequences.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Direction {
    /// From the first step to the last.
    #[default]
    Forward,
    /// From each row's last valid step to the first.
    Reverse,
    /// Both, their outputs side by side: forward first.
    Both,
}

impl Direction {
    /// The passes over time, `true` for those in reverse.
    pub(super) fn passes(self) -> &'static [bool] {
        match self {
            Direction::Forward => &[false],
            Direction::Reverse => &[true],
            Direction::Both => &[false, true],
        }
    }
}

/// How the outputs of two directions become the output of a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Merge {
    /// Side by side, forward first: twice as wide.
    #[default]
    Concat,
    /// Their sum.
    Sum,
    /// Half their sum.
    Mean,
    /// Their product, number by number.
    Product,
}

/// Where a GRU's reset gate acts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reset {
    /// After the recurrent product, `r (W_hn h' + b_hn)`: PyTorch, cuDNN.
    #[default]
    AfterProduct,
    /// Before it, `W_hn (r h') + b_hn`: Cho et al. (2014), ONNX's default.
    BeforeProduct,
}

/// Sizes and options of a recurrent layer; [`RecurrentConfig::init`] makes the layer.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RecurrentConfig<C> {
    pub(super) cell: C,
    pub(in crate::nn) input: usize,
    pub(super) hidden: usize,
    pub(super) layers: usize,
    pub(in crate::nn) direction: Direction,
    pub(super) dropout: f32,
    pub(super) bias: bool,
    pub(in crate::nn) batch_first: bool,
    pub(super) forget_bias: Option<f32>,
    /// R, and whether the output product has a bias.
    pub(super) output: Option<(usize, bool)>,
    pub(super) zoneout: [f32; 2],
    pub(super) weight_dropout: f32,
    pub(super) recurrent_dropout: f32,
    pub(super) gradient_clip: f32,
    pub(super) layer_norm: bool,
    pub(super) merge: Merge,
    pub(super) residual: bool,
    pub(in crate::nn) learn_initial_state: bool,
    pub(super) precision: Precision,
}

/// Sizes and options of an [`super::Lstm`].
pub type LstmConfig = RecurrentConfig<LstmCell>;
/// Sizes and options of a [`super::Gru`].
pub type GruConfig = RecurrentConfig<GruCell>;
/// Sizes and options of an [`super::Rnn`].
pub type RnnConfig = RecurrentConfig<RnnCell>;
/// Sizes and options of an [`super::IndRnn`].
pub type IndRnnConfig = RecurrentConfig<IndRnnCell>;
/// Sizes and options of an [`super::SLstm`].
pub type SLstmConfig = RecurrentConfig<SLstmCell>;
/// Sizes and options of a [`super::MinGru`].
pub type MinGruConfig = RecurrentConfig<MinGruCell>;
/// Sizes and options of a [`super::MinLstm`].
pub type MinLstmConfig = RecurrentConfig<MinLstmCell>;

impl<C: Cell> RecurrentConfig<C> {
    /// One layer of `hidden` units over inputs of `input` numbers, forward in time, with biases.
    pub fn new(input: usize, hidden: usize) -> Self {
        Self {
            cell: C::default(),
            input,
            hidden,
            layers: 1,
            direction: Direction::Forward,
            dropout: 0.0,
            bias: true,
            batch_first: false,
            forget_bias: None,
            output: None,
            zoneout: [0.0; 2],
            weight_dropout: 0.0,
            recurrent_dropout: 0.0,
            gradient_clip: 0.0,
            layer_norm: false,
            merge: Merge::Concat,
            residual: false,
            learn_initial_state: false,
            precision: Precision::Single,
        }
    }

    /// Layers on top of each other, each fed by the outputs of the one below.
    pub fn layers(self, layers: usize) -> Self {
        Self { layers, ..self }
    }

    /// Which way time is read.
    pub fn direction(self, direction: Direction) -> Self {
        Self { direction, ..self }
    }

    /// How the outputs of two directions become the output of a layer; needs [`Direction::Both`] where it is not
    /// [`Merge::Concat`].
    pub fn merge(self, merge: Merge) -> Self {
        Self { merge, ..self }
    }

    /// Each layer whose input is as wide as its output adds that input to its output, after dropout (He et al. 2016; Wu et al.
    /// 2016 between recurrent layers).
    pub fn residual(self, residual: bool) -> Self {
        Self { residual, ..self }
    }

    /// Learn the state that rows start from where none is given: `initial_h_l0`, .. , one for each layer and direction, zeros at
    /// first.
    pub fn learn_initial_state(self, learn: bool) -> Self {
        Self { learn_initial_state: learn, ..self }
    }

    /// In training, zero each output between two layers with probability `p` and scale the others by `1 / (1 - p)`;
    /// needs at least two layers.
    pub fn dropout(self, p: f32) -> Self {
        Self { dropout: p, ..self }
    }

    /// Whether there are biases.
    pub fn bias(self, bias: bool) -> Self {
        Self { bias, ..self }
    }

    /// Whether x and y are `[batch, seq, ..]` instead of `[seq, batch, ..]`; states are not affected, as in PyTorch.
    pub fn batch_first(self, batch_first: bool) -> Self {
        Self { batch_first, ..self }
    }

    /// Zoneout (Krueger et al. 2016): in training each unit of h keeps its previous value with probability `h`, and each unit
    /// of the cell's other states with probability `others`; without a tape the state is the mean of both. The output is h
    /// after that.
    pub fn zoneout(self, h: f32, others: f32) -> Self {
        Self { zoneout: [h, others], ..self }
    }

    /// DropConnect on the recurrent weights (Wan et al. 2013; Merity et al. 2017): in training each number of W_hh is zero with
    /// probability `p` for the whole sequence, and the others are scaled by `1 / (1 - p)`. The weights themselves stay as they are.
    pub fn weight_dropout(self, p: f32) -> Self {
        Self { weight_dropout: p, ..self }
    }

    /// Recurrent dropout (Gal & Ghahramani 2016): in training each gate's recurrent product sees h with units zeroed with probability
    /// `p`, by a mask of its own that is the same at all steps, and the others scaled by `1 / (1 - p)`. Where h is used outside the
    /// products (a GRU's `z h'`), it is whole.
    pub fn recurrent_dropout(self, p: f32) -> Self {
        Self { recurrent_dropout: p, ..self }
    }

    /// In back-propagation through time, keep each element of the gradient that a step gets from later ones within `[-limit, limit]`.
    /// [`Recurrent::clipped_gradients`] tells how often that acted.
    pub fn gradient_clip(self, limit: f32) -> Self {
        Self { gradient_clip: limit, ..self }
    }

    /// Layer normalization (Ba, Kiros & Hinton 2016), of each step and row by itself: of `W_ih x` and of `W_hh h`, with the gains
    /// `norm_ih` and `norm_hh` `[gates * hidden]`, before their biases are added. All four gates of an LSTM are normalized together,
    /// and c is on its way to h, `h = o tanh(LN(c))`, with the gain `norm_c` and the shift `norm_c_bias` `[hidden]`. Of a GRU r and z
    /// are normalized together, n by itself; its reset gate acts after the product.
    pub fn layer_norm(self, layer_norm: bool) -> Self {
        Self { layer_norm, ..self }
    }

    /// The precision of all matrix products, forward and backward, [`Precision::Single`] at first.
    pub fn precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// The layer, with every weight and bias drawn from U(-1/sqrt(hidden), 1/sqrt(hidden)), as PyTorch does; gains
    /// of normalizations start at 1, shifts at 0, and u of an [`super::IndRnn`] is drawn from U(0, 1).
    ///
    /// # Errors
    /// [`crate::ErrorKind::Argument`] for a size of 0, a probability outside `[0, 1)`, and other numbers out of range, by name;
    /// [`crate::ErrorKind::Unsupported`] for options that do not go together;
    /// [`crate::ErrorKind::Limit`] or [`crate::ErrorKind::OutOfMemory`] when the device cannot hold it.
    pub fn init(self, device: &Device, rng: &mut Rng) -> Result<Recurrent<C>> {
        self.check()?;
        Recurrent::init(self, device, rng)
    }

    pub(super) fn directions(&self) -> usize {
        self.direction.passes().len()
    }

    /// R: the width of h and of one direction's output.
    pub(super) fn width(&self) -> usize {
        self.output.map_or(self.hidden, |(width, _)| width)
    }

    /// Where a layer normalizes its cell state on the way to h: see [`Cell::normalized_output`].
    pub(super) fn normalized_output(&self) -> Option<(C, Activation)> {
        self.cell.normalized_output().filter(|_| self.layer_norm)
    }

    /// The width of a layer's output.
    pub(super) fn output_width(&self) -> usize {
        if self.is_merged() { self.width() } else { self.directions().saturating_mul(self.width()) }
    }

    /// Whether the directions' outputs are apart before they become one.
    pub(super) fn is_merged(&self) -> bool {
        self.merge != Merge::Concat
    }

    /// Whether a layer with this many inputs adds them to its output.
    pub(super) fn adds_input(&self, inputs: usize) -> bool {
        self.residual && inputs == self.output_width()
    }

    fn check(&self) -> Result<()> {
        let op = format!("{}.init", C::NAME);
        let width = self.output.map(|(width, _)| ("projection", width));
        for (name, size) in [("input", self.input), ("hidden", self.hidden), ("layers", self.layers)].into_iter().chain(width) {
            if size == 0 {
                return Err(Error::argument(&op, name, size, "at least 1"));
            }
        }
        for (name, p) in [
            ("dropout", self.dropout),
            ("zoneout", self.zoneout[0]),
            ("zoneout", self.zoneout[1]),
            ("weight_dropout", self.weight_dropout),
            ("recurrent_dropout", self.recurrent_dropout),
        ] {
            if !(0.0..1.0).contains(&p) {
                return Err(Error::argument(&op, name, p, "in [0, 1)"));
            }
        }
        if self.dropout > 0.0 && self.layers == 1 {
            return Err(Error::argument(&op, "dropout", self.dropout, "0 for a single layer: it acts between layers"));
        }
        if !(self.gradient_clip >= 0.0 && self.gradient_clip.is_finite()) {
            return Err(Error::argument(&op, "gradient_clip", self.gradient_clip, "a finite number of at least 0 (0: none)"));
        }
        if let Some(bias) = self.forget_bias.filter(|bias| !bias.is_finite()) {
            return Err(Error::argument(&op, "forget_bias", bias, "a finite number"));
        }
        if self.forget_bias.is_some() && !self.bias {
            return Err(Error::argument(&op, "forget_bias", "given", "biases, which bias(false) removed"));
        }
        if self.is_merged() && self.direction != Direction::Both {
            let expected = "Direction::Both, whose two outputs it makes one";
            return Err(Error::argument(
                &op,
                "merge",
                format!("{:?} with Direction::{:?}", self.merge, self.direction),
                expected,
            ));
        }
        if self.residual && self.layers == 1 && !self.adds_input(self.input) {
            let expected = format!("an input as wide as the output, {}, or more layers", self.output_width());
            return Err(Error::argument(&op, "residual", format!("an input of {}", self.input), expected));
        }
        for (name, p) in [("weight_dropout", self.weight_dropout), ("recurrent_dropout", self.recurrent_dropout)] {
            if p > 0.0 && !C::PRODUCT {
                return Err(Error::unsupported(&op, format!("{name} acts on the recurrent product, and this cell has none")));
            }
        }
        if self.cell.gated().is_some() && self.recurrent_dropout > 0.0 {
            let what = "recurrent_dropout with Reset::BeforeProduct: whether the mask acts before or after the reset gate is not defined";
            return Err(Error::unsupported(&op, what));
        }
        if self.cell.gated().is_some() && self.output.is_some() {
            return Err(Error::unsupported(
                &op,
                "an output product with Reset::BeforeProduct, whose gate would have to be as wide",
            ));
        }
        if self.forget_bias.is_some() && !self.cell.has_forget_gate() {
            return Err(Error::unsupported(&op, "forget_bias with coupled(true), where f = 1 - i has no bias of its own"));
        }
        if self.zoneout[1] > 0.0 && C::State::LEN == 1 {
            return Err(Error::unsupported(&op, "zoneout of other states than h: this cell has none"));
        }
        if self.zoneout[1] > 0.0 && C::State::LEN > 2 {
            return Err(Error::unsupported(&op, "zoneout of c, n and m, which share one scale: hold h alone"));
        }
        if self.output.is_some() && self.zoneout != [0.0; 2] {
            return Err(Error::unsupported(
                &op,
                "zoneout with an output product: which of the two states of h to hold is not defined",
            ));
        }
        if self.output.is_some() && self.gradient_clip > 0.0 {
            return Err(Error::unsupported(&op, "gradient_clip with an output product"));
        }
        if self.layer_norm && self.cell.norms().is_empty() {
            return Err(Error::unsupported(
                &op,
                "layer_norm, which is defined for an LSTM, and for a GRU with Reset::AfterProduct",
            ));
        }
        if self.normalized_output().is_some() && self.zoneout != [0.0; 2] {
            return Err(Error::unsupported(&op, "zoneout with layer_norm of a cell state"));
        }
        if self.normalized_output().is_some() && self.gradient_clip > 0.0 {
            return Err(Error::unsupported(&op, "gradient_clip with layer_norm of a cell state"));
        }
        self.cell.check(&op)
    }
}

/// `op: argument ..` unless the activation's numbers are in their ranges.
pub(super) fn check_activation(op: &str, argument: &str, activation: Activation) -> Result<()> {
    activation.check().map_err(|expected| Error::argument(op, argument, format!("{activation:?}"), expected))
}

/// `op: argument ..` unless the limit is 0 (none) or a number above it.
pub(super) fn check_limit(op: &str, argument: &str, limit: f32) -> Result<()> {
    match limit >= 0.0 && limit.is_finite() {
        true => Ok(()),
        false => Err(Error::argument(op, argument, limit, "a finite number of at least 0 (0: none)")),
    }
}

impl LstmConfig {
    /// Start with forget gates open: the two forget biases add up to `bias` (Jozefowicz et al. 2015 advise 1).
    pub fn forget_bias(self, bias: f32) -> Self {
        Self { forget_bias: Some(bias), ..self }
    }

    /// A recurrent projection (Sak et al. 2014; PyTorch's `proj_size`): `h = W_hr (o tanh(c))` of `width` numbers is what the
    /// next step and the next layer see.
    pub fn projection(self, width: usize) -> Self {
        Self { output: Some((width, false)), ..self }
    }

    /// Peepholes (Gers & Schmidhuber 2000; ONNX's P): the gates see the cell state, i and f the previous one, o the new one,
    /// through `weight_peephole [3 * hidden]`, in the order i, f, o.
    pub fn peepholes(self, peepholes: bool) -> Self {
        Self { cell: LstmCell { peepholes, ..self.cell }, ..self }
    }

    /// Coupled gates (Greff et al. 2015; ONNX's input_forget): f = 1 - i. The rows of f stay in the weights, so that shapes and
    /// files do not change, and have no effect and no gradient; with layer normalisation they count in the mean and variance of all gates.
    pub fn coupled(self, coupled: bool) -> Self {
        Self { cell: LstmCell { coupled, ..self.cell }, ..self }
    }

    /// Keep each element of the cell state within `[-limit, limit]` (Sak et al. 2014; TensorFlow's `cell_clip`); 0: none.
    pub fn cell_clip(self, limit: f32) -> Self {
        Self { cell: LstmCell { cell_clip: limit, ..self.cell }, ..self }
    }

    /// Keep each gate's pre-activation within `[-limit, limit]` (ONNX's `clip`); 0: none.
    pub fn gate_clip(self, limit: f32) -> Self {
        Self { cell: LstmCell { clip: limit, ..self.cell }, ..self }
    }

    /// Other activations: of i, f and o; of g; of c on its way to h.
    pub fn activations(self, gate: Activation, candidate: Activation, output: Activation) -> Self {
        Self { cell: LstmCell { gate, candidate, output, ..self.cell }, ..self }
    }
}

impl GruConfig {
    /// Where the reset gate acts.
    pub fn reset(self, reset: Reset) -> Self {
        Self { cell: GruCell { reset_before: reset == Reset::BeforeProduct, ..self.cell }, ..self }
    }

    /// Keep each pre-activation within `[-limit, limit]` (ONNX's `clip`); 0: none.
    pub fn gate_clip(self, limit: f32) -> Self {
        Self { cell: GruCell { clip: limit, ..self.cell }, ..self }
    }

    /// Other activations: of r and z; of n.
    pub fn activations(self, gate: Activation, candidate: Activation) -> Self {
        Self { cell: GruCell { gate, candidate, ..self.cell }, ..self }
    }
}

impl RnnConfig {
    /// The activation, tanh at first.
    pub fn activation(self, activation: Activation) -> Self {
        Self { cell: RnnCell { activation, ..self.cell }, ..self }
    }

    /// Keep each pre-activation within `[-limit, limit]` (ONNX's `clip`); 0: none.
    pub fn gate_clip(self, limit: f32) -> Self {
        Self { cell: RnnCell { clip: limit, ..self.cell }, ..self }
    }

    /// Recurrence through the output only (Jordan 1986): `h(t) = tanh(b + W o(t-1) + U x(t))`, `o(t) = c + V h(t)`. The layer's
    /// output and its state are o, of `outputs` numbers; W is `weight_hh [hidden, outputs]`, V `weight_hr [outputs, hidden]`, c
    /// `bias_hr [outputs]`.
    pub fn jordan(self, outputs: usize) -> Self {
        Self { output: Some((outputs, true)), ..self }
    }
}

impl IndRnnConfig {
    /// The activation, relu at first.
    pub fn activation(self, activation: Activation) -> Self {
        Self { cell: IndRnnCell { activation }, ..self }
    }
}
