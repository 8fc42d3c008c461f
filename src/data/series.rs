//! Multivariate time series: a checked table, its normalisation, and sliding windows over it.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// A table of finite numbers: one row a time step, one named column a feature.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    columns: Vec<String>,
    values: Vec<f32>,
}

impl Series {
    /// The `rows` of a table, oldest first, with one value for each of `columns`.
    ///
    /// # Errors
    /// `Argument` if there is no row or no column, if two columns have the same name, if a row has another number of
    /// values than there are columns, or if a value is not finite.
    pub fn new(columns: &[impl AsRef<str>], rows: &[impl AsRef<[f32]>]) -> Result<Self> {
        let op = "Series.new";
        let columns: Vec<String> = columns.iter().map(|name| name.as_ref().to_string()).collect();
        if columns.is_empty() || rows.is_empty() {
            let given = format!("of {} rows and {} columns", rows.len(), columns.len());
            return Err(Error::argument(op, "the table", given, "at least one of each"));
        }
        if let Some((at, name)) = columns.iter().enumerate().find(|&(at, name)| columns[..at].contains(name)) {
            return Err(Error::argument(op, &format!("name of column {at}"), format!("{name:?} again"), "a new name"));
        }
        let mut values = Vec::with_capacity(rows.len() * columns.len());
        for (at, row) in rows.iter().enumerate() {
            let row = row.as_ref();
            if row.len() != columns.len() {
                return Err(Error::shape(op, &format!("row {at}"), &[row.len()], format!("[{} columns]", columns.len())));
            }
            values.extend_from_slice(row);
        }
        Self::checked(op, columns, values)
    }

    /// A series of `values`, row after row, if all of them are finite.
    fn checked(op: &str, columns: Vec<String>, values: Vec<f32>) -> Result<Self> {
        if let Some((at, value)) = values.iter().enumerate().find(|(_, value)| !value.is_finite()) {
            let (row, column) = (at / columns.len(), &columns[at % columns.len()]);
            return Err(Error::argument(op, &format!("row {row}, column {column:?}"), value, "a finite number"));
        }
        Ok(Self { columns, values })
    }

    /// The names of the columns.
    pub fn columns(&self) -> &[String] {
        &self.columns
    }

    /// The index of the column `name`.
    ///
    /// # Errors
    /// `Argument` if there is no such column.
    pub fn column(&self, name: &str) -> Result<usize> {
        let found = self.columns.iter().position(|column| column == name);
        let expected = || format!("one of {:?}", self.columns);
        found.ok_or_else(|| Error::argument("Series.column", "name", format!("{name:?}"), expected()))
    }

    /// The number of rows, at least 1.
    pub fn rows(&self) -> usize {
        self.values.len() / self.columns.len()
    }

    /// The number of columns, at least 1.
    pub fn features(&self) -> usize {
        self.columns.len()
    }

    /// `[rows, features]`: the values, row after row.
    pub fn values(&self) -> &[f32] {
        &self.values
    }
}

/// An error unless `range` holds at least one row and lies within the `count` rows of a series.
fn check_rows(op: &str, argument: &str, range: &Range<usize>, count: usize) -> Result<()> {
    if range.is_empty() || range.end > count {
        return Err(Error::argument(op, argument, format!("{range:?}"), format!("a range of rows within 0..{count}")));
    }
    Ok(())
}

/// Mean and standard deviation of each feature: `apply` gives `(value - mean) / deviation`.
///
/// Fit it to the training rows alone: statistics that have seen the test rows make the test look better than it is.
///
/// ```
/// use gatefold::data::{Normalizer, Series};
/// let series = Series::new(&["temperature"], &[[10.0], [14.0], [20.0]])?;
/// let normalizer = Normalizer::fit(&series, 0..2)?; // mean 12, deviation 2
/// assert_eq!(normalizer.apply(&series)?.values(), [-1.0, 1.0, 4.0]);
/// assert_eq!(normalizer.invert(0, 4.0)?, 20.0);
/// # Ok::<(), gatefold::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Saved")]
pub struct Normalizer {
    columns: Vec<String>,
    mean: Vec<f32>,
    deviation: Vec<f32>,
}

/// A normalizer as it was read, before it is checked.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    columns: Vec<String>,
    mean: Vec<f32>,
    deviation: Vec<f32>,
}

impl Normalizer {
    /// Mean and deviation (the root of the mean squared distance from the mean) over `rows` of `series`, summed in f64.
    /// A constant feature gets the deviation 1, so that it becomes 0.
    ///
    /// # Errors
    /// `Argument` if `rows` is empty or does not lie within the series.
    pub fn fit(series: &Series, rows: Range<usize>) -> Result<Self> {
        check_rows("Normalizer.fit", "rows", &rows, series.rows())?;
        let (features, count) = (series.features(), rows.len() as f64);
        let (mut mean, mut deviation) = (Vec::with_capacity(features), Vec::with_capacity(features));
        for feature in 0..features {
            let value = |row: usize| f64::from(series.values[row * features + feature]);
            // In f64 the sum of fewer than 2^29 equal f32 values is exact: a constant column has variance 0, not nearly 0.
            let center = rows.clone().map(value).sum::<f64>() / count;
            let variance = rows.clone().map(|row| (value(row) - center).powi(2)).sum::<f64>() / count;
            let root = variance.sqrt() as f32;
            mean.push(center as f32);
            deviation.push(if root == 0.0 { 1.0 } else { root });
        }
        Ok(Self { columns: series.columns.clone(), mean, deviation })
    }

    /// The normalised series, of the same shape.
    ///
    /// # Errors
    /// `Argument` if the columns are not those that the normalizer was fitted to, in their order, or if a normalised
    /// value is too large for f32.
    pub fn apply(&self, series: &Series) -> Result<Series> {
        if series.columns != self.columns {
            let (given, expected) = (format!("{:?}", series.columns), format!("{:?}", self.columns));
            return Err(Error::argument("Normalizer.apply", "series.columns()", given, expected));
        }
        let normalise = |(at, &value): (usize, &f32)| {
            let feature = at % self.columns.len();
            ((f64::from(value) - f64::from(self.mean[feature])) / f64::from(self.deviation[feature])) as f32
        };
        Series::checked("Normalizer.apply", self.columns.clone(), series.values.iter().enumerate().map(normalise).collect())
    }

    /// A normalised `value` of column `feature` in the units of the series it was fitted to.
    ///
    /// # Errors
    /// `Argument` if there is no such column.
    pub fn invert(&self, feature: usize, value: f32) -> Result<f32> {
        match (self.mean.get(feature), self.deviation.get(feature)) {
            (Some(&mean), Some(&deviation)) => Ok((f64::from(value) * f64::from(deviation) + f64::from(mean)) as f32),
            _ => Err(Error::argument("Normalizer.invert", "feature", feature, format!("less than {}", self.columns.len()))),
        }
    }

    /// `[features]`: the mean of each column.
    pub fn mean(&self) -> &[f32] {
        &self.mean
    }

    /// `[features]`: the standard deviation of each column, 1 for a constant one.
    pub fn deviation(&self) -> &[f32] {
        &self.deviation
    }

    /// The normalizer as JSON: `{"columns": [..], "deviation": [..], "mean": [..]}`.
    pub fn to_json(&self) -> String {
        serde_json::json!(self).to_string()
    }

    /// A normalizer from what [`to_json`](Self::to_json) gave, to the same bits.
    ///
    /// # Errors
    /// `Format` if `json` is not such text: an unknown field, lists of different lengths or empty ones, a number that
    /// f32 cannot hold, or a deviation that is not positive.
    pub fn from_json(json: &str) -> Result<Self> {
        serde_json::from_str(json).map_err(|error| Error::format("Normalizer.from_json", &error).with_source(error))
    }
}

impl TryFrom<Saved> for Normalizer {
    type Error = String;

    fn try_from(Saved { columns, mean, deviation }: Saved) -> std::result::Result<Self, String> {
        let lengths = [columns.len(), mean.len(), deviation.len()];
        if lengths.contains(&0) || lengths != [columns.len(); 3] {
            return Err(format!("columns, mean and deviation have lengths {lengths:?}, expected the same, at least 1"));
        }
        for ((column, mean), deviation) in columns.iter().zip(&mean).zip(&deviation) {
            if !mean.is_finite() {
                return Err(format!("mean of {column:?} is {mean}, expected a finite number"));
            }
            if !(deviation.is_finite() && *deviation > 0.0) {
                return Err(format!("deviation of {column:?} is {deviation}, expected a finite number above 0"));
            }
        }
        Ok(Self { columns, mean, deviation })
    }
}

/// What a window shows and what is to be forecast from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowSpec {
    /// The rows that a window holds, at least 1.
    pub past: usize,
    /// How many rows after the window's last one the target lies, at least 1.
    pub horizon: usize,
    /// The column to forecast.
    pub target: usize,
}

impl WindowSpec {
    /// The first row of a series that has a whole window before it: `past + horizon - 1`.
    pub fn first_target(&self) -> usize {
        self.past.saturating_add(self.horizon).saturating_sub(1)
    }
}

/// Sliding windows over a series, one for each target row.
///
/// Window `i` forecasts column `target` of row `r = targets.start + i` from the rows `r - horizon - past + 1` to
/// `r - horizon`. Only targets are confined to a range: the first windows of a test year reach back into the rows before
/// it, as a forecaster would.
///
/// ```
/// use gatefold::data::{Series, WindowSpec, Windows};
/// let series = Series::new(&["a"], &[[0.0], [1.0], [2.0], [3.0], [4.0]])?;
/// let spec = WindowSpec { past: 2, horizon: 1, target: series.column("a")? };
/// let train = Windows::new(&series, spec, spec.first_target()..4)?;
/// let test = Windows::new(&series, spec, 4..5)?;
/// assert_eq!((train.len(), test.len()), (2, 1));
/// let batch = train.batch(&[0, 1])?;
/// assert_eq!(batch.x, [0.0, 1.0, 1.0, 2.0]); // [past, rows, features]
/// assert_eq!(batch.y, [2.0, 3.0]);
/// # Ok::<(), gatefold::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Windows<'a> {
    series: &'a Series,
    spec: WindowSpec,
    targets: Range<usize>,
}

/// Some windows and their targets, in the units of the series; made by [`Windows::batch`].
#[derive(Clone, Debug, PartialEq)]
pub struct WindowBatch {
    /// `[past, rows, features]`, time-major.
    pub x: Vec<f32>,
    /// `[rows]`: the target of each window.
    pub y: Vec<f32>,
    /// The rows of the series that a window holds.
    pub past: usize,
    /// The number of windows.
    pub rows: usize,
    /// The number of columns of the series.
    pub features: usize,
}

impl<'a> Windows<'a> {
    /// One window for each row of `series` in `targets`.
    ///
    /// # Errors
    /// `Argument` if `past` or `horizon` is 0, if there is no such target column, if `targets` is empty or does not lie
    /// within the series, or if it starts before [`WindowSpec::first_target`].
    pub fn new(series: &'a Series, spec: WindowSpec, targets: Range<usize>) -> Result<Self> {
        let op = "Windows.new";
        for (name, value) in [("past", spec.past), ("horizon", spec.horizon)] {
            if value == 0 {
                return Err(Error::argument(op, name, value, "at least 1"));
            }
        }
        if spec.target >= series.features() {
            return Err(Error::argument(op, "target", spec.target, format!("a column less than {}", series.features())));
        }
        check_rows(op, "targets", &targets, series.rows())?;
        if targets.start < spec.first_target() {
            let expected = format!("a start of at least past + horizon - 1 = {}", spec.first_target());
            return Err(Error::argument(op, "targets", format!("{targets:?}"), expected));
        }
        Ok(Self { series, spec, targets })
    }

    /// The number of windows.
    #[expect(clippy::len_without_is_empty, reason = "there is always at least one window")]
    pub fn len(&self) -> usize {
        self.targets.len()
    }

    /// The windows with the given `indices`, in their order.
    ///
    /// # Errors
    /// `Argument` if `indices` is empty or one of them is not below [`len`](Self::len).
    pub fn batch(&self, indices: &[usize]) -> Result<WindowBatch> {
        if indices.is_empty() {
            return Err(Error::argument("Windows.batch", "indices", "an empty list", "at least one index"));
        }
        if let Some(index) = indices.iter().find(|index| **index >= self.len()) {
            return Err(Error::argument("Windows.batch", "an index", index, format!("less than {}", self.len())));
        }
        let (past, features) = (self.spec.past, self.series.features());
        let values = &self.series.values;
        let mut x = Vec::with_capacity(past * indices.len() * features);
        for step in 0..past {
            for index in indices {
                let row = self.targets.start + index - self.spec.first_target() + step;
                x.extend_from_slice(&values[row * features..][..features]);
            }
        }
        let target = |index: &usize| values[(self.targets.start + index) * features + self.spec.target];
        Ok(WindowBatch { x, y: indices.iter().map(target).collect(), past, rows: indices.len(), features })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    fn text<T>(result: Result<T>) -> String {
        result.err().map_or_else(String::new, |error| error.to_string())
    }

    /// Columns "t" and "u": row r is [r, 100 + r].
    fn counting(rows: usize) -> Result<Series> {
        Series::new(&["t", "u"], &(0..rows).map(|row| [row as f32, 100.0 + row as f32]).collect::<Vec<_>>())
    }

    #[test]
    fn series_are_checked() -> Result<()> {
        let good: &[f32] = &[1.0, 2.0];
        type Case<'a> = (&'a [&'a str], &'a [&'a [f32]], &'a str);
        let cases: [Case<'_>; 8] = [
            (&["a", "b"], &[good, good], ""),
            (&["a", "b"], &[], "Series.new: the table is of 0 rows and 2 columns, expected at least one of each"),
            (&[], &[good], "Series.new: the table is of 1 rows and 0 columns, expected at least one of each"),
            (&["a", "a"], &[good], "Series.new: name of column 1 is \"a\" again, expected a new name"),
            (&["a", "b"], &[good, &[1.0]], "Series.new: row 1 has shape [1], expected [2 columns]"),
            (&["a", "b"], &[good, &[1.0, 2.0, 3.0]], "Series.new: row 1 has shape [3], expected [2 columns]"),
            (&["a", "b"], &[good, good, &[0.0, f32::NAN]], "Series.new: row 2, column \"b\" is NaN, expected a finite number"),
            (
                &["a", "b"],
                &[good, &[f32::NEG_INFINITY, 0.0]],
                "Series.new: row 1, column \"a\" is -inf, expected a finite number",
            ),
        ];
        for (columns, rows, expected) in cases {
            assert_eq!(text(Series::new(columns, rows)), expected);
        }
        let series = counting(3)?;
        assert_eq!((series.rows(), series.features(), series.columns()), (3, 2, &["t".into(), "u".into()][..]));
        assert_eq!(series.values(), [0.0, 100.0, 1.0, 101.0, 2.0, 102.0]);
        assert_eq!(series.column("u")?, 1);
        assert_eq!(text(series.column("v")), r#"Series.column: name is "v", expected one of ["t", "u"]"#);
        Ok(())
    }

    #[test]
    fn normalizer_sees_only_its_rows() -> Result<()> {
        // Summed in f32, the constant would keep a tiny deviation, and the large column would lose its own.
        let row = |r: u32| if r < 10 { [r as f32, 0.1, 1e6 + r as f32] } else { [1e9, -1e9, 1e9] };
        let series = Series::new(&["a", "constant", "large"], &(0..12).map(row).collect::<Vec<_>>())?;
        let normalizer = Normalizer::fit(&series, 0..10)?;
        let deviation = 8.25_f32.sqrt(); // of 0..10: (10^2 - 1) / 12
        assert_eq!(normalizer.mean(), [4.5, 0.1, 1_000_004.5]);
        assert_eq!(normalizer.deviation(), [deviation, 1.0, deviation]);
        let normal = normalizer.apply(&series)?;
        assert_eq!(normal.columns(), series.columns());
        assert_eq!(normal.values()[..3], [-4.5 / deviation, 0.0, -4.5 / deviation]);
        for (at, (&value, &original)) in normal.values().iter().zip(series.values()).enumerate() {
            let back = normalizer.invert(at % 3, value)?;
            let scale = original.abs() + normalizer.mean()[at % 3].abs();
            assert!((back - original).abs() <= f32::EPSILON * scale, "{back} from {original}");
        }
        // A later part of the series may be normalised by what the earlier part gave.
        assert_eq!(Normalizer::fit(&counting(9)?, 4..5)?.mean(), [4.0, 104.0]);
        Ok(())
    }

    #[test]
    fn normalizer_errors() -> Result<()> {
        let series = counting(4)?;
        let fitted = Normalizer::fit(&series, 0..4)?;
        let swapped = Series::new(&["u", "t"], &[[1.0, 2.0]])?;
        let tiny = Normalizer::fit(&Series::new(&["t", "u"], &[[0.0, 0.0], [1e-30, 1e-30]])?, 0..2)?;
        let huge = Series::new(&["t", "u"], &[[0.0, 0.0], [0.0, 1e30]])?;
        #[expect(clippy::reversed_empty_ranges, reason = "what a caller may pass by mistake")]
        let reversed = 3..1;
        for (given, expected) in [
            (text(Normalizer::fit(&series, 2..2)), "Normalizer.fit: rows is 2..2, expected a range of rows within 0..4"),
            (text(Normalizer::fit(&series, reversed)), "Normalizer.fit: rows is 3..1, expected a range of rows within 0..4"),
            (text(Normalizer::fit(&series, 2..5)), "Normalizer.fit: rows is 2..5, expected a range of rows within 0..4"),
            (text(fitted.invert(2, 0.0)), "Normalizer.invert: feature is 2, expected less than 2"),
            (text(fitted.apply(&swapped)), r#"Normalizer.apply: series.columns() is ["u", "t"], expected ["t", "u"]"#),
            (text(tiny.apply(&huge)), "Normalizer.apply: row 1, column \"u\" is inf, expected a finite number"),
        ] {
            assert_eq!(given, expected);
        }
        Ok(())
    }

    #[test]
    fn normalizer_json() -> Result<()> {
        let rows: Vec<[f32; 2]> = (0..50).map(|r| [(r as f32).sin() * 1e-12, (r as f32).cos() / 3.0]).collect();
        let normalizer = Normalizer::fit(&Series::new(&["a", "b"], &rows)?, 0..50)?;
        assert_eq!(Normalizer::from_json(&normalizer.to_json())?, normalizer);
        for (json, expected) in [
            (r#"{"columns":["a"],"mean":[0]}"#, "missing field `deviation` at line 1 column 28"),
            (
                r#"{"columns":["a"],"mean":[0],"std":[1]}"#,
                "unknown field `std`, expected one of `columns`, `mean`, `deviation` at line 1 column 33",
            ),
            (
                r#"{"columns":["a"],"mean":[0],"deviation":[1,1]}"#,
                "columns, mean and deviation have lengths [1, 1, 2], expected the same, at least 1",
            ),
            (
                r#"{"columns":[],"mean":[],"deviation":[]}"#,
                "columns, mean and deviation have lengths [0, 0, 0], expected the same, at least 1",
            ),
            (r#"{"columns":["a"],"mean":[0],"deviation":[0]}"#, "deviation of \"a\" is 0, expected a finite number above 0"),
            (r#"{"columns":["a"],"mean":[1e39],"deviation":[1]}"#, "mean of \"a\" is inf, expected a finite number"),
        ] {
            let error = Normalizer::from_json(json).map_err(|error| (error.kind(), error.to_string()));
            assert_eq!(error, Err((ErrorKind::Format, format!("Normalizer.from_json: {expected}"))));
        }
        Ok(())
    }

    #[test]
    fn windows_end_before_their_targets() -> Result<()> {
        let series = counting(20)?;
        for (past, horizon, targets, indices) in
            [(3, 1, 3..20, vec![0, 16]), (1, 1, 1..2, vec![0]), (4, 5, 12..20, vec![7, 0, 3]), (19, 1, 19..20, vec![0])]
        {
            let spec = WindowSpec { past, horizon, target: 1 };
            let windows = Windows::new(&series, spec, targets.clone())?;
            assert_eq!(windows.len(), targets.len());
            let batch = windows.batch(&indices)?;
            assert_eq!((batch.past, batch.rows, batch.features), (past, indices.len(), 2));
            assert_eq!((batch.x.len(), batch.y.len()), (past * indices.len() * 2, indices.len()));
            for (row, index) in indices.iter().enumerate() {
                let target = targets.start + index;
                assert_eq!(batch.y[row], 100.0 + target as f32);
                for step in 0..past {
                    // The window's last row lies `horizon` rows before the target.
                    let expected = (target - horizon - (past - 1 - step)) as f32;
                    assert_eq!(batch.x[(step * indices.len() + row) * 2..][..2], [expected, 100.0 + expected]);
                }
            }
        }
        Ok(())
    }

    #[test]
    fn windows_errors() -> Result<()> {
        let series = counting(10)?;
        let new = |past, horizon, target, targets| Windows::new(&series, WindowSpec { past, horizon, target }, targets);
        let windows = new(3, 2, 0, 4..10)?;
        for (given, expected) in [
            (text(new(0, 1, 0, 4..10)), "Windows.new: past is 0, expected at least 1"),
            (text(new(3, 0, 0, 4..10)), "Windows.new: horizon is 0, expected at least 1"),
            (text(new(3, 1, 2, 4..10)), "Windows.new: target is 2, expected a column less than 2"),
            (text(new(3, 1, 0, 4..4)), "Windows.new: targets is 4..4, expected a range of rows within 0..10"),
            (text(new(3, 1, 0, 4..11)), "Windows.new: targets is 4..11, expected a range of rows within 0..10"),
            (text(new(3, 2, 0, 3..10)), "Windows.new: targets is 3..10, expected a start of at least past + horizon - 1 = 4"),
            (text(windows.batch(&[])), "Windows.batch: indices is an empty list, expected at least one index"),
            (text(windows.batch(&[5, 6])), "Windows.batch: an index is 6, expected less than 6"),
        ] {
            assert_eq!(given, expected);
        }
        Ok(())
    }
}
