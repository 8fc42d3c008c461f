//! The order in which an epoch visits its examples.

use crate::error::{Error, Result};
use crate::rng::Rng;

/// The indices `0..count` in a random order, cut into batches of `size`; the last batch holds what is left and may be
/// smaller.
///
/// Call it once an epoch: each call takes new numbers from `rng`.
///
/// # Errors
/// `Argument` if `count` or `size` is 0.
///
/// ```
/// let mut rng = gatefold::Rng::seed(0);
/// let epoch = gatefold::data::shuffled_batches(10, 4, &mut rng)?;
/// assert_eq!(epoch.iter().map(Vec::len).collect::<Vec<_>>(), [4, 4, 2]);
/// # Ok::<(), gatefold::Error>(())
/// ```
pub fn shuffled_batches(count: usize, size: usize, rng: &mut Rng) -> Result<Vec<Vec<usize>>> {
    for (name, value) in [("count", count), ("size", size)] {
        if value == 0 {
            return Err(Error::argument("shuffled_batches", name, value, "at least 1"));
        }
    }
    let mut order: Vec<usize> = (0..count).collect();
    rng.shuffle(&mut order);
    Ok(order.chunks(size).map(<[usize]>::to_vec).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_index_once_an_epoch() -> Result<()> {
        for (count, size, lengths) in [(10, 4, vec![4, 4, 2]), (8, 4, vec![4, 4]), (3, 7, vec![3]), (1, 1, vec![1])] {
            let batches = shuffled_batches(count, size, &mut Rng::seed(3))?;
            assert_eq!(batches.iter().map(Vec::len).collect::<Vec<_>>(), lengths);
            let mut indices = batches.concat();
            indices.sort_unstable();
            assert_eq!(indices, (0..count).collect::<Vec<_>>());
        }
        Ok(())
    }

    #[test]
    fn epochs_differ_and_seeds_repeat() -> Result<()> {
        let mut rng = Rng::seed(3);
        let (first, second) = (shuffled_batches(50, 8, &mut rng)?, shuffled_batches(50, 8, &mut rng)?);
        assert_ne!(first.concat(), (0..50).collect::<Vec<_>>());
        assert_ne!(first, second);
        assert_eq!(first, shuffled_batches(50, 8, &mut Rng::seed(3))?);
        Ok(())
    }

    #[test]
    fn nothing_to_cut_is_an_error() {
        for (count, size, text) in [
            (0, 4, "shuffled_batches: count is 0, expected at least 1"),
            (4, 0, "shuffled_batches: size is 0, expected at least 1"),
        ] {
            let error = shuffled_batches(count, size, &mut Rng::seed(0)).map_err(|error| error.to_string());
            assert_eq!(error, Err(text.to_string()));
        }
    }
}
