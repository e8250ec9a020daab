//! Ranks in a grid of named dimensions.

use super::Placement;
use crate::Error;

/// Ranks in a grid of named dimensions, as PyTorch's `DeviceMesh` has it: rank 1 is the neighbour of rank 0 along the last.
///
/// ```
/// use gradprobe::ranks::{Along, Mesh, Placement};
///
/// let mesh = Mesh::new([("dp", 2), ("tp", 4)])?;
/// assert_eq!(mesh.placement([])?, Placement::Replicated);
/// assert_eq!(mesh.placement([("tp", Along::Sharded)])?, Placement::Ranks(vec![0, 1, 2, 3]));
/// # Ok::<(), gradprobe::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Mesh {
    dimensions: Vec<(String, u32)>,
}

/// Where the elements of a tensor are along a dimension of a [`Mesh`]. Along those that are not named all ranks hold the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Along {
    /// Each rank holds a part, some perhaps none.
    Sharded,
    /// The ranks at this coordinate hold it, and no others.
    At(u32),
}

impl Mesh {
    /// With these dimensions and their lengths.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] unless each has a name of its own and a rank, and there are fewer than 2^32 ranks.
    pub fn new<N: Into<String>>(dimensions: impl IntoIterator<Item = (N, u32)>) -> Result<Self, Error> {
        let dimensions: Vec<(String, u32)> =
            dimensions.into_iter().map(|(name, length)| (name.into(), length)).collect();
        let is_twice =
            |(at, (name, _)): (usize, &(String, u32))| dimensions[..at].iter().any(|(other, _)| other == name);
        let ranks = dimensions.iter().try_fold(1u32, |ranks, (_, length)| ranks.checked_mul(*length));
        if dimensions.iter().enumerate().any(is_twice) || ranks.is_none_or(|ranks| ranks == 0) {
            let expected = "of dimensions with names of their own, each of at least 1, and fewer than 2^32 ranks";
            return Err(Error::InvalidConfig { option: "mesh", expected, value: format!("{dimensions:?}") });
        }
        Ok(Self { dimensions })
    }

    /// How many ranks it has.
    pub fn ranks(&self) -> u32 {
        self.dimensions.iter().map(|(_, length)| length).product()
    }

    /// The coordinates of a rank, one a dimension. Of ranks that it does not have, those of the rank modulo their number.
    pub fn coordinates(&self, rank: u32) -> Vec<u32> {
        let mut rest = rank;
        let mut coordinates: Vec<u32> = self
            .dimensions
            .iter()
            .rev()
            .map(|(_, length)| {
                let coordinate = rest % length;
                rest /= length;
                coordinate
            })
            .collect();
        coordinates.reverse();
        coordinates
    }

    /// The placement of a tensor that lies so along these dimensions, and is the same along the others: parts are in the order of
    /// the ranks, and counted where the coordinates of all dimensions that are not named are 0. Replicas are compared where
    /// no dimension is named; where some are, nobody looks at those that are not counted.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a dimension that there is not, or twice, and a coordinate beyond its length.
    pub fn placement<'a>(&self, along: impl IntoIterator<Item = (&'a str, Along)>) -> Result<Placement, Error> {
        let mut wanted = vec![None; self.dimensions.len()];
        for (name, how) in along {
            let place = self.dimensions.iter().position(|(other, _)| other == name);
            let is_beyond = |place: usize| matches!(how, Along::At(at) if at >= self.dimensions[place].1);
            match place.filter(|&place| wanted[place].is_none() && !is_beyond(place)) {
                Some(place) => wanted[place] = Some(how),
                None => {
                    let expected = "along a dimension of the mesh, named once, and within its length";
                    let value = format!("{how:?} along {name:?} of {:?}", self.dimensions);
                    return Err(Error::InvalidConfig { option: "placement", expected, value });
                }
            }
        }
        if wanted.iter().all(Option::is_none) {
            return Ok(Placement::Replicated);
        }
        if wanted.iter().all(|how| *how == Some(Along::Sharded)) {
            return Ok(Placement::Sharded);
        }
        let counts = |(coordinate, how): (u32, &Option<Along>)| match how {
            None => coordinate == 0,
            Some(Along::Sharded) => true,
            Some(Along::At(at)) => coordinate == *at,
        };
        let is_counted = |rank: &u32| self.coordinates(*rank).into_iter().zip(&wanted).all(counts);
        Ok(Placement::Ranks((0..self.ranks()).filter(is_counted).collect()))
    }
}
