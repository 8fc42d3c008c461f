//! Token sequences as rectangular time-major batches: padded with lengths, or cut from one long stream.

use crate::error::{Error, Result};

/// Sequences of different lengths as one rectangle; made by [`pad`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Padded {
    /// `[steps, rows]`, time-major: id `t` of sequence `b` lies at `t * rows + b`.
    pub ids: Vec<u32>,
    /// `[rows]`: how many ids of each row count; 0 for an empty sequence.
    pub lengths: Vec<u32>,
    /// The length of the longest sequence.
    pub steps: usize,
    /// The number of sequences.
    pub rows: usize,
}

/// Pads `sequences` at their ends with the id `padding` to the length of the longest. Their order is kept, and some of
/// them may be empty.
///
/// # Errors
/// `Argument` if there is no sequence, if all of them are empty, or if one is longer than `u32::MAX`.
///
/// ```
/// let padded = gatefold::data::pad(&[vec![5, 6, 7], vec![8]], gatefold::data::PAD)?;
/// assert_eq!((padded.steps, padded.rows), (3, 2));
/// assert_eq!(padded.ids, [5, 8, 6, 0, 7, 0]);
/// assert_eq!(padded.lengths, [3, 1]);
/// # Ok::<(), gatefold::Error>(())
/// ```
pub fn pad(sequences: &[impl AsRef<[u32]>], padding: u32) -> Result<Padded> {
    let rows = sequences.len();
    let steps = sequences.iter().map(|sequence| sequence.as_ref().len()).max();
    let steps = steps.ok_or_else(|| Error::argument("pad", "sequences", "an empty list", "at least one sequence"))?;
    if steps == 0 {
        return Err(Error::argument("pad", "sequences", format!("{rows} empty sequences"), "at least one id"));
    }
    let mut ids = vec![padding; steps * rows];
    let mut lengths = Vec::with_capacity(rows);
    for (row, sequence) in sequences.iter().enumerate() {
        let sequence = sequence.as_ref();
        for (step, &id) in sequence.iter().enumerate() {
            ids[step * rows + row] = id;
        }
        let length = u32::try_from(sequence.len());
        lengths.push(length.map_err(|_| Error::shape("pad", "a sequence", &[sequence.len()], "at most u32::MAX ids"))?);
    }
    Ok(Padded { ids, lengths, steps, rows })
}

/// One long sequence cut into parallel streams, for language models trained by truncated backpropagation through time.
///
/// With `length = (ids - 1) / rows`, row `b` reads `ids[b * length..][..length]`, and its targets are the ids one place
/// later. [`TokenStreams::windows`] walks all rows at once, `steps` ids a window. Row `b` of a window goes on where row
/// `b` of the window before it ended, so the state of the network may be carried over; start from a fresh state at the
/// first window. Fewer than `rows` ids at the end are left out.
///
/// ```
/// let ids: Vec<u32> = (10..17).collect();
/// let streams = gatefold::data::TokenStreams::new(&ids, 2, 2)?;
/// let windows: Vec<_> = streams.windows().collect();
/// assert_eq!(windows[0].inputs, [10, 13, 11, 14]); // rows 10 11 .. and 13 14 ..
/// assert_eq!(windows[0].targets, [11, 14, 12, 15]);
/// assert_eq!(windows[1].inputs, [12, 15]); // the last window may be shorter
/// assert_eq!(windows[1].targets, [13, 16]);
/// # Ok::<(), gatefold::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct TokenStreams<'a> {
    ids: &'a [u32],
    rows: usize,
    steps: usize,
}

/// `steps` consecutive ids of every stream, with their successors; made by [`TokenStreams::windows`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenWindow {
    /// `[steps, rows]`, time-major.
    pub inputs: Vec<u32>,
    /// `[steps, rows]`, time-major: the id that follows each input.
    pub targets: Vec<u32>,
    /// The time steps of this window: those asked for, or fewer in the last one.
    pub steps: usize,
    /// The number of streams.
    pub rows: usize,
}

impl<'a> TokenStreams<'a> {
    /// `rows` streams over `ids`, read `steps` ids at a time.
    ///
    /// # Errors
    /// `Argument` if `rows` or `steps` is 0, or if `ids` holds fewer than `rows + 1` ids.
    pub fn new(ids: &'a [u32], rows: usize, steps: usize) -> Result<Self> {
        for (name, value) in [("rows", rows), ("steps", steps)] {
            if value == 0 {
                return Err(Error::argument("TokenStreams.new", name, value, "at least 1"));
            }
        }
        if ids.len() <= rows {
            let expected = format!("more ids than the {rows} rows");
            return Err(Error::shape("TokenStreams.new", "ids", &[ids.len()], expected));
        }
        Ok(Self { ids, rows, steps })
    }

    /// The windows from the first to the last; there is at least one.
    pub fn windows(&self) -> impl ExactSizeIterator<Item = TokenWindow> + use<'a> {
        let Self { ids, rows, steps } = *self;
        let length = (ids.len() - 1) / rows;
        (0..length.div_ceil(steps)).map(move |window| {
            let times = window * steps..length.min((window + 1) * steps);
            let gather = |shift: usize| {
                times.clone().flat_map(|t| (0..rows).map(move |row| ids[row * length + t + shift])).collect::<Vec<_>>()
            };
            TokenWindow { inputs: gather(0), targets: gather(1), steps: times.len(), rows }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_is_time_major_and_keeps_lengths() -> Result<()> {
        type Case<'a> = (&'a [&'a [u32]], &'a [u32], &'a [u32], usize);
        let cases: [Case<'_>; 4] = [
            (&[&[1, 2], &[], &[3, 4, 5]], &[1, 9, 3, 2, 9, 4, 9, 9, 5], &[2, 0, 3], 3),
            (&[&[7]], &[7], &[1], 1),
            (&[&[], &[7]], &[9, 7], &[0, 1], 1),
            (&[&[9, 9]], &[9, 9], &[2], 2), // a real id may equal the padding: lengths tell them apart
        ];
        for (sequences, ids, lengths, steps) in cases {
            let (ids, lengths) = (ids.to_vec(), lengths.to_vec());
            assert_eq!(pad(sequences, 9)?, Padded { ids, lengths, steps, rows: sequences.len() });
        }
        Ok(())
    }

    #[test]
    fn nothing_to_pad_is_an_error() {
        let cases: [(&[&[u32]], &str); 2] = [
            (&[], "pad: sequences is an empty list, expected at least one sequence"),
            (&[&[], &[], &[]], "pad: sequences is 3 empty sequences, expected at least one id"),
        ];
        for (sequences, text) in cases {
            assert_eq!(pad(sequences, 0).map_err(|error| error.to_string()), Err(text.to_string()));
        }
    }

    #[test]
    fn streams_continue_from_window_to_window() -> Result<()> {
        let ids: Vec<u32> = (0..200).collect();
        for (count, rows, steps) in [(13, 3, 3), (14, 3, 3), (15, 3, 4), (2, 1, 1), (9, 8, 5), (200, 7, 10)] {
            let streams = TokenStreams::new(&ids[..count], rows, steps)?;
            let length = (count - 1) / rows;
            assert_eq!(streams.windows().len(), length.div_ceil(steps));
            let mut read = vec![Vec::new(); rows];
            for (k, window) in streams.windows().enumerate() {
                assert_eq!((window.steps, window.rows), (steps.min(length - k * steps), rows));
                assert_eq!(window.inputs.len(), window.steps * rows);
                // Ids count up from 0, so the successor of an id is the id plus one.
                assert_eq!(window.targets, window.inputs.iter().map(|id| id + 1).collect::<Vec<_>>());
                window.inputs.iter().enumerate().for_each(|(at, &id)| read[at % rows].push(id));
            }
            // The rows, one after the other, are the sequence: nothing twice, nothing skipped.
            assert_eq!(read.concat(), ids[..rows * length]);
        }
        Ok(())
    }

    #[test]
    fn streams_refuse_empty_shapes() {
        for (count, rows, steps, text) in [
            (9, 0, 4, "TokenStreams.new: rows is 0, expected at least 1"),
            (9, 4, 0, "TokenStreams.new: steps is 0, expected at least 1"),
            (4, 4, 1, "TokenStreams.new: ids has shape [4], expected more ids than the 4 rows"),
        ] {
            let result = TokenStreams::new(&[0; 9][..count], rows, steps).map(|_| ());
            assert_eq!(result.map_err(|error| error.to_string()), Err(text.to_string()));
        }
    }
}
