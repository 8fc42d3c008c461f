//! Reverse-mode automatic differentiation over f64 vectors: equations are written forward, [`Tape::backward`] differentiates
//! them. The oracle of the recurrent layers is made of this, so that no backward equation there is derived by hand.

use std::array::from_fn;
use std::cell::RefCell;
use std::ops::{Add, Div, Index, Mul, Neg, Range, Sub};
use std::rc::Rc;

/// The logistic function `1 / (1 + e^-x)`.
pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// All vectors of a computation, in the order in which they were computed.
#[derive(Debug, Default)]
pub struct Tape(RefCell<Vec<Node>>);

#[derive(Debug)]
struct Node {
    value: Rc<[f64]>,
    origin: Origin,
}

/// Which vectors a vector was computed from, by their places on the tape, and what backward needs.
#[derive(Debug)]
enum Origin {
    Leaf,
    /// An elementwise function of one vector, and its derivative.
    Map(usize, Vec<f64>),
    /// An elementwise function of two vectors, and its derivatives by both.
    Zip([usize; 2], [Vec<f64>; 2]),
    /// Rows of a matrix, from that row on, times a vector; what is done to each factor first.
    Product {
        matrix: usize,
        first_row: usize,
        x: usize,
        round: fn(f64) -> f64,
    },
    /// Neighbouring elements, from that one on.
    Slice(usize, usize),
    Concat(Vec<usize>),
    Sum(usize),
    Repeat(usize),
}

/// A vector on a tape. Operators are elementwise, between vectors of one length or with a number.
#[derive(Clone, Copy, Debug)]
pub struct Var<'t> {
    tape: &'t Tape,
    place: usize,
}

/// The gradient of a computation by each of its vectors: `gradients[var]`, as long as the vector.
#[derive(Debug)]
pub struct Gradients(Vec<Vec<f64>>);

impl Index<Var<'_>> for Gradients {
    type Output = [f64];

    fn index(&self, var: Var<'_>) -> &[f64] {
        &self.0[var.place]
    }
}

impl Tape {
    /// A vector that is given: a parameter, or a constant whose gradient nobody looks at. A matrix is row-major.
    pub fn leaf(&self, value: impl Into<Rc<[f64]>>) -> Var<'_> {
        self.push(value.into(), Origin::Leaf)
    }

    /// All vectors one after the other.
    pub fn concat(&self, parts: &[Var<'_>]) -> Var<'_> {
        let value: Vec<f64> = parts.iter().flat_map(|part| part.value().to_vec()).collect();
        self.push(value.into(), Origin::Concat(parts.iter().map(|part| part.place).collect()))
    }

    /// The gradients of `sum over seeds of <var, seed>`: each seed is the gradient of a loss by that vector.
    pub fn backward(&self, seeds: &[(Var<'_>, &[f64])]) -> Gradients {
        let nodes = self.0.borrow();
        // An empty gradient is zero so far.
        let mut gradients: Vec<Vec<f64>> = vec![Vec::new(); nodes.len()];
        let open = |gradient: &mut Vec<f64>, place: usize| gradient.resize(nodes[place].value.len(), 0.0);
        for (var, seed) in seeds {
            open(&mut gradients[var.place], var.place);
            add(&mut gradients[var.place], seed);
        }
        for (place, node) in nodes.iter().enumerate().rev() {
            let (earlier, rest) = gradients.split_at_mut(place);
            let d = &mut rest[0];
            if d.is_empty() {
                open(d, place);
                continue;
            }
            let mut of = |place: usize, f: &mut dyn FnMut(&mut [f64])| {
                open(&mut earlier[place], place);
                f(&mut earlier[place]);
            };
            match &node.origin {
                Origin::Leaf => {}
                Origin::Map(x, by_x) => of(*x, &mut |dx| add_products(dx, d, by_x)),
                Origin::Zip(operands, derivatives) => {
                    for (operand, derivative) in operands.iter().zip(derivatives) {
                        of(*operand, &mut |dx| add_products(dx, d, derivative));
                    }
                }
                Origin::Product { matrix, first_row, x, round } => {
                    // The factors of the backward products, too: a rounding has derivative 1.
                    let all = |values: &[f64]| -> Vec<f64> { values.iter().map(|value| round(*value)).collect() };
                    let x_value = &all(&nodes[*x].value);
                    let from = first_row * x_value.len();
                    let (w, d) = (&all(&nodes[*matrix].value[from..from + d.len() * x_value.len()]), &all(d));
                    let lines = || w.chunks_exact(x_value.len()).zip(d.iter());
                    of(*x, &mut |dx| lines().for_each(|(line, d)| add_scaled(dx, line, *d)));
                    of(*matrix, &mut |dw| {
                        let lines = dw[from..].chunks_exact_mut(x_value.len()).zip(d.iter());
                        lines.for_each(|(line, d)| add_scaled(line, x_value, *d));
                    });
                }
                Origin::Slice(x, start) => of(*x, &mut |dx| add(&mut dx[*start..start + d.len()], d)),
                Origin::Concat(parts) => {
                    let mut rest = &d[..];
                    for part in parts {
                        let (first, others) = rest.split_at(nodes[*part].value.len());
                        of(*part, &mut |dx| add(dx, first));
                        rest = others;
                    }
                }
                Origin::Sum(x) => of(*x, &mut |dx| dx.iter_mut().for_each(|dx| *dx += d[0])),
                Origin::Repeat(x) => of(*x, &mut |dx| dx[0] += d.iter().sum::<f64>()),
            }
        }
        Gradients(gradients)
    }

    fn push(&self, value: Rc<[f64]>, origin: Origin) -> Var<'_> {
        let mut nodes = self.0.borrow_mut();
        nodes.push(Node { value, origin });
        Var { tape: self, place: nodes.len() - 1 }
    }
}

#[allow(clippy::len_without_is_empty, reason = "no vector is empty")]
impl<'t> Var<'t> {
    /// The elements.
    pub fn value(self) -> Rc<[f64]> {
        self.tape.0.borrow()[self.place].value.clone()
    }

    /// The number of elements.
    pub fn len(self) -> usize {
        self.tape.0.borrow()[self.place].value.len()
    }

    /// An elementwise function, which gives value and derivative.
    pub fn map(self, f: impl Fn(f64) -> (f64, f64)) -> Self {
        let (value, by_x): (Vec<f64>, Vec<f64>) = self.value().iter().map(|x| f(*x)).unzip();
        self.tape.push(value.into(), Origin::Map(self.place, by_x))
    }

    /// An elementwise function of two vectors, which gives its value and the derivatives by the first and the second.
    pub fn zip(self, other: Self, f: impl Fn(f64, f64) -> (f64, [f64; 2])) -> Self {
        let (a, b) = (self.value(), other.value());
        assert_eq!(a.len(), b.len());
        let (value, by): (Vec<f64>, Vec<[f64; 2]>) = a.iter().zip(b.iter()).map(|(a, b)| f(*a, *b)).unzip();
        let by = from_fn(|operand| by.iter().map(|by| by[operand]).collect());
        self.tape.push(value.into(), Origin::Zip([self.place, other.place], by))
    }

    /// `rows` of this matrix \[m,n\] times x \[n\].
    pub fn product(self, rows: Range<usize>, x: Self) -> Self {
        self.product_of(rows, x, |factor| factor)
    }

    /// The same of rounded factors, as are those of the products that give its gradients.
    pub fn product_of(self, rows: Range<usize>, x: Self, round: fn(f64) -> f64) -> Self {
        let all = |values: &[f64]| -> Vec<f64> { values.iter().map(|value| round(*value)).collect() };
        let (n, first_row) = (x.value().len(), rows.start);
        let (matrix, vector) = (all(&self.value()[rows.start * n..rows.end * n]), all(&x.value()));
        let value: Vec<f64> = matrix.chunks_exact(n).map(|line| dot(line, &vector)).collect();
        self.tape.push(value.into(), Origin::Product { matrix: self.place, first_row, x: x.place, round })
    }

    /// Elements `range`.
    pub fn slice(self, range: Range<usize>) -> Self {
        self.tape.push(self.value()[range.clone()].into(), Origin::Slice(self.place, range.start))
    }

    /// The sum of all elements \[1\].
    pub fn sum(self) -> Self {
        self.tape.push([self.value().iter().sum::<f64>()].into(), Origin::Sum(self.place))
    }

    /// A vector of `count` times this one element.
    pub fn repeat(self, count: usize) -> Self {
        let value = self.value();
        assert_eq!(value.len(), 1);
        self.tape.push(vec![value[0]; count].into(), Origin::Repeat(self.place))
    }

    /// `e^x`.
    pub fn exp(self) -> Self {
        self.map(|x| (x.exp(), x.exp()))
    }

    /// The natural logarithm.
    pub fn ln(self) -> Self {
        self.map(|x| (x.ln(), 1.0 / x))
    }

    /// The square root.
    pub fn sqrt(self) -> Self {
        self.map(|x| (x.sqrt(), 0.5 / x.sqrt()))
    }

    /// The hyperbolic tangent.
    pub fn tanh(self) -> Self {
        self.map(|x| (x.tanh(), 1.0 - x.tanh() * x.tanh()))
    }

    /// The logistic function.
    pub fn sigmoid(self) -> Self {
        self.map(|x| (sigmoid(x), sigmoid(x) * sigmoid(-x)))
    }

    /// `ln(1 + e^x)`.
    pub fn softplus(self) -> Self {
        self.map(|x| (x.max(0.0) + (-x.abs()).exp().ln_1p(), sigmoid(x)))
    }

    /// The larger of two, which gets the gradient; the first of two equal ones.
    pub fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a >= b || a.is_nan() { (a, [1.0, 0.0]) } else { (b, [0.0, 1.0]) })
    }

    /// `x` held within `low..=high`. Outside the gradient is 0, on a bound it is 1.
    pub fn clamp(self, low: f64, high: f64) -> Self {
        self.map(|x| (x.clamp(low, high), f64::from(u8::from((low..=high).contains(&x)))))
    }
}

impl Add for Var<'_> {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| (a + b, [1.0, 1.0]))
    }
}

impl Sub for Var<'_> {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| (a - b, [1.0, -1.0]))
    }
}

impl Mul for Var<'_> {
    type Output = Self;

    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| (a * b, [b, a]))
    }
}

impl Div for Var<'_> {
    type Output = Self;

    fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| (a / b, [1.0 / b, -a / (b * b)]))
    }
}

impl Neg for Var<'_> {
    type Output = Self;

    fn neg(self) -> Self {
        self.map(|x| (-x, -1.0))
    }
}

impl Add<f64> for Var<'_> {
    type Output = Self;

    fn add(self, number: f64) -> Self {
        self.map(|x| (x + number, 1.0))
    }
}

impl Mul<f64> for Var<'_> {
    type Output = Self;

    fn mul(self, number: f64) -> Self {
        self.map(|x| (x * number, number))
    }
}

impl<'t> Sub<Var<'t>> for f64 {
    type Output = Var<'t>;

    fn sub(self, other: Var<'t>) -> Var<'t> {
        other.map(|x| (self - x, -1.0))
    }
}

/// In eight sums, so that a machine can compute them at once.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (a, b) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a.zip(b) {
        (0..8).for_each(|n| sums[n] += a[n] * b[n]);
    }
    rest + sums.iter().sum::<f64>()
}

fn add(sum: &mut [f64], terms: &[f64]) {
    assert_eq!(sum.len(), terms.len());
    sum.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
}

fn add_products(sum: &mut [f64], a: &[f64], b: &[f64]) {
    sum.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a * b);
}

fn add_scaled(sum: &mut [f64], terms: &[f64], factor: f64) {
    sum.iter_mut().zip(terms).for_each(|(sum, term)| *sum += factor * term);
}

#[cfg(test)]
mod tests {
    use super::*;

    type Function = for<'t> fn(&[Var<'t>]) -> Var<'t>;

    /// Every operation: the derivative along each coordinate against central differences.
    #[test]
    fn gradients_are_central_differences() {
        let (a, b) = (vec![0.7, -1.3, 0.2], vec![-0.4, 0.9, 1.1]);
        let positive = vec![0.5, 2.0, 1.5];
        let matrix = vec![1.0, -2.0, 0.5, 0.25, 3.0, -1.5, -0.75, 0.1, 2.5, 0.3, 0.6, -0.9];
        let cases: [(&str, Function, Vec<&Vec<f64>>); 23] = [
            ("add", |v| v[0] + v[1], vec![&a, &b]),
            ("sub", |v| v[0] - v[1], vec![&a, &b]),
            ("mul", |v| v[0] * v[1], vec![&a, &b]),
            ("square", |v| v[0] * v[0], vec![&a]),
            ("div", |v| v[0] / v[1], vec![&a, &b]),
            ("neg", |v| -v[0], vec![&a]),
            ("shift", |v| v[0] + 3.0, vec![&a]),
            ("scale", |v| v[0] * 3.0, vec![&a]),
            ("from a number", |v| 3.0 - v[0], vec![&a]),
            ("product", |v| v[0].product(0..4, v[1]), vec![&matrix, &a]),
            ("product of rows", |v| v[0].product(1..3, v[1]), vec![&matrix, &a]),
            ("products", |v| v[0].product(1..4, v[0].product(0..3, v[1])), vec![&matrix, &a]),
            ("slice", |v| v[0].slice(1..3), vec![&a]),
            ("concat", |v| v[0].tape.concat(&[v[0], v[1].slice(0..2), v[0]]), vec![&a, &b]),
            ("sum", |v| v[0].sum() * 2.0, vec![&a]),
            ("repeat", |v| v[0].slice(1..2).repeat(4), vec![&a]),
            ("exp", |v| v[0].exp(), vec![&a]),
            ("ln and sqrt", |v| v[0].ln() + v[0].sqrt(), vec![&positive]),
            ("tanh", |v| v[0].tanh(), vec![&a]),
            ("sigmoid", |v| v[0].sigmoid(), vec![&a]),
            ("softplus", |v| v[0].softplus(), vec![&a]),
            ("max", |v| v[0].max(v[1]), vec![&a, &b]),
            ("clamp", |v| v[0].clamp(-0.5, 0.5), vec![&a]),
        ];
        for (name, function, given) in cases {
            // The loss is <value, seed>.
            let loss = |given: &[Vec<f64>]| {
                let tape = Tape::default();
                let vars: Vec<Var<'_>> = given.iter().map(|value| tape.leaf(&value[..])).collect();
                let value = function(&vars);
                let seed: Vec<f64> = (0..value.len()).map(|n| 1.0 - 0.3 * n as f64).collect();
                let gradients = tape.backward(&[(value, &seed)]);
                (dot(&value.value(), &seed), vars.iter().map(|var| gradients[*var].to_vec()).collect::<Vec<_>>())
            };
            let mut at: Vec<Vec<f64>> = given.into_iter().cloned().collect();
            let (_, gradients) = loss(&at);
            for operand in 0..at.len() {
                for n in 0..at[operand].len() {
                    let (here, e) = (at[operand][n], 1e-5);
                    let mut beside = |x: f64| {
                        at[operand][n] = x;
                        loss(&at).0
                    };
                    let difference = (beside(here + e) - beside(here - e)) / (2.0 * e);
                    beside(here);
                    let gradient = gradients[operand][n];
                    let what = format!("{name}: {gradient} but differences give {difference}");
                    assert!((gradient - difference).abs() <= 1e-8, "{what} at {n} of operand {operand}");
                }
            }
        }
    }

    #[test]
    fn values_by_hand() {
        let tape = Tape::default();
        let x = tape.leaf([-800.0, 0.0, 800.0]);
        assert_eq!(*x.sigmoid().value(), [0.0, 0.5, 1.0]);
        assert_eq!(*x.softplus().value(), [0.0, 2f64.ln(), 800.0]);
        assert_eq!(*x.clamp(0.0, 1.0).value(), [0.0, 0.0, 1.0]);
        assert_eq!(*tape.leaf([1.0, 2.0, 3.0, 4.0]).product(1..2, tape.leaf([1.0, 10.0])).value(), [43.0]);

        // Gradients of all seeds and all uses add up; on a bound a clamped value follows, of equal ones the first.
        let gradients = tape.backward(&[(x.clamp(0.0, 1.0), &[1.0; 3]), (x.max(x + 0.0), &[10.0; 3]), (x, &[100.0; 3])]);
        assert_eq!(gradients[x], [110.0, 111.0, 110.0]);
        assert_eq!(tape.backward(&[])[x], [0.0; 3]);
    }
}
