//! Meshes of ranks: every layout that the documentation lists has the norm of the whole on all ranks.
#![allow(clippy::cast_precision_loss, reason = "small numbers")]

use super::ranks::on_ranks;
use crate::common::host::OnHost;
use gradprobe::{
    Config, Cpu, DType, Error, HostTensor, Plan, Probe,
    ranks::{Along, Mesh, Ranks},
};

/// Dimensions of a mesh, and how a tensor lies along them.
type Layout = (&'static [(&'static str, u32)], &'static [(&'static str, Along)]);

/// Those of the documentation's table.
const LAYOUTS: [Layout; 11] = [
    (&[("dp", 3)], &[]),
    (&[("dp", 3)], &[("dp", Along::Sharded)]),
    (&[("replicate", 2), ("shard", 3)], &[("shard", Along::Sharded)]),
    (&[("dp", 2), ("tp", 2)], &[("tp", Along::Sharded)]),
    (&[("dp", 2), ("tp", 2)], &[]),
    (&[("dp", 2), ("tp", 3)], &[("dp", Along::Sharded), ("tp", Along::Sharded)]),
    (&[("pp", 3), ("dp", 2)], &[("pp", Along::At(2))]),
    (&[("pp", 3), ("dp", 2)], &[("pp", Along::At(2)), ("dp", Along::Sharded)]),
    (&[("dp", 2), ("ep", 2)], &[("ep", Along::At(1))]),
    (&[("dp", 2), ("ep", 2)], &[("ep", Along::Sharded)]),
    (&[("pp", 2), ("dp", 2)], &[("pp", Along::At(0))]),
];

/// What a rank holds of a tensor: by its coordinates along the dimensions, the last of which changes fastest.
fn held(whole: &[f32], dimensions: &[(&str, u32)], along: &[(&str, Along)], rank: u32) -> Option<Vec<f32>> {
    let mut held = (0, 1); // which part, of how many
    let mut stride: u32 = dimensions.iter().map(|(_, length)| length).product();
    for (name, length) in dimensions {
        stride /= length;
        let coordinate = rank / stride % length;
        match along.iter().find(|(other, _)| other == name) {
            Some((_, Along::Sharded)) => held = (held.0 * length + coordinate, held.1 * length),
            Some((_, Along::At(at))) if coordinate != *at => return None,
            _ => {}
        }
    }
    // Uneven, and empty where there are more parts than elements.
    let each = whole.len().div_ceil(held.1 as usize);
    let cut = |part: u32| whole.len().min(part as usize * each);
    Some(whole[cut(held.0)..cut(held.0 + 1)].to_vec())
}

#[test]
fn every_layout_of_the_table_has_the_norm_of_the_whole() {
    for (dimensions, along) in LAYOUTS {
        let mesh = Mesh::new(dimensions.iter().copied()).unwrap();
        let layout = mesh.layout(along.iter().copied()).unwrap();
        for len in [7, 1] {
            let whole: Vec<f32> = (0..len).map(|i| 2.0 + i as f32).collect();
            let squares: f32 = whole.iter().map(|x| x * x).sum();
            let seen = on_ranks(mesh.ranks(), |rank, end| {
                let own = held(&whole, dimensions, along, rank);
                let tensors = own.iter().map(|own| ("t", DType::F32, own.len() as u64));
                let ranks = Ranks::new(end, &mesh, own.iter().map(|_| layout.clone()));
                let mut probe = Probe::new(Cpu, Plan::new(tensors).unwrap(), Config::default().ranks(ranks)).unwrap();
                let own: Vec<HostTensor> = own.iter().map(|own| HostTensor::F32(own)).collect();
                *probe.measure_host(&own).unwrap().outputs()
            });
            for outputs in seen {
                assert_eq!(outputs.total_norm, f64::from(squares).sqrt(), "{dimensions:?} {along:?}");
                assert_eq!(outputs.flags, 0);
            }
        }
    }
}

#[test]
fn what_no_mesh_has_is_refused() {
    for dimensions in [&[("dp", 2), ("dp", 2)][..], &[("dp", 0)], &[("dp", 1 << 16), ("tp", 1 << 15)]] {
        let refused = Mesh::new(dimensions.iter().copied());
        assert!(matches!(refused, Err(Error::InvalidConfig { option: "mesh", .. })), "{refused:?}");
    }
    let mesh = Mesh::new([("dp", 2), ("tp", 4)]).unwrap();
    assert_eq!((mesh.ranks(), mesh.coordinates(6)), (8, vec![1, 2]));
    let twice = [("tp", Along::Sharded), ("tp", Along::At(0))];
    for along in [&[("pp", Along::Sharded)][..], &[("tp", Along::At(4))], &twice] {
        let refused = mesh.layout(along.iter().copied());
        assert!(matches!(refused, Err(Error::InvalidConfig { option: "layout", .. })), "{refused:?}");
    }
}
