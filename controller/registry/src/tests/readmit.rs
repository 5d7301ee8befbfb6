//! Tests of the return of nodes and of the mesh's configuration to a store that does not have them.

use super::*;
use crate::ReadmitError;

/// Returns an empty world of the same mesh, as it is after the loss of the store.
fn emptied(world: &World) -> World {
    let mut empty = World::of(config());
    (empty.now, empty.drawn) = (world.now, world.drawn);
    empty
}

#[test]
fn a_node_returns_to_an_empty_store_with_its_grant_and_publishes_again() {
    let mut world = World::new();
    let a = world.node("a", 1, &["10.0.0.0/8"]);
    let b = world.node("b", 2, &[]);
    let grants = [a, b].map(|node| world.registry.member(node).unwrap().grant.clone());

    let mut empty = emptied(&world);
    for grant in &grants {
        empty.registry.readmit(grant.clone(), empty.now).unwrap();
        // A repeated request changes nothing.
        empty.registry.readmit(grant.clone(), empty.now).unwrap();
    }
    let keys = empty.commit();
    assert_eq!(keys.iter().filter(|key| matches!(key, Key::Node(_))).count(), 2);
    assert!(empty.signed.contains(&Unsigned::Grant(a)));
    assert_eq!(empty.registry.member(a).unwrap().grant, grants[0]);
    empty.open(a);
    empty.publish(a, 7, &[net("10.1.0.0/16")]).unwrap();
    assert_eq!(empty.holder("10.1.0.0/16"), Some(a));

    // Who joins next gets no address of a node that returned.
    let c = empty.node("c", 3, &[]);
    let address = empty.registry.member(c).unwrap().grant.overlay.v4;
    assert!(grants.iter().all(|grant| grant.overlay.v4 < address), "{address}");
}

#[test]
fn a_removed_node_does_not_return_and_none_takes_what_another_has() {
    let mut world = World::new();
    let a = world.node("a", 1, &[]);
    let grant = world.registry.member(a).unwrap().grant.clone();
    let tombstone = world.remove(a);
    let refused = world.registry.readmit(grant.clone(), world.now);
    assert!(matches!(refused, Err(ReadmitError::Absent(NodeAbsent::Removed { .. }))));

    // The tombstone may arrive after the node.
    let mut empty = emptied(&world);
    empty.registry.readmit(grant.clone(), empty.now).unwrap();
    assert_eq!(empty.registry.resync(vec![tombstone], &empty.sessions, empty.now), 1);
    assert!(empty.is_removed(a));

    let mut other = emptied(&world);
    other.node("a", 9, &[]);
    let refused = other.registry.readmit(grant.clone(), other.now);
    assert!(matches!(refused, Err(ReadmitError::Taken { .. })), "{refused:?}");

    let mut moved =
        World::of(MeshConfig { overlay_v4: "198.18.0.0/24".parse().unwrap(), ..config() });
    let refused = moved.registry.readmit(grant, moved.now);
    assert!(matches!(refused, Err(ReadmitError::OutsideOverlay { .. })), "{refused:?}");
}

#[test]
fn the_newest_configuration_returns_and_an_empty_store_has_none_of_its_own() {
    let mut world = World::new();
    let ours = world.registry.mesh().config.clone();
    let protected = MeshConfig { protected: vec![net("10.0.0.0/8")], ..ours.clone() };
    let other_overlay =
        MeshConfig { overlay_v4: "198.18.0.0/24".parse().unwrap(), ..protected.clone() };

    // Without nodes the registry's own configuration is worth nothing, whatever its number is.
    assert!(world.registry.adopt_mesh(other_overlay.clone()));
    assert!(!world.registry.adopt_mesh(other_overlay.clone()), "it has it already");
    assert!(world.registry.adopt_mesh(protected.clone()));
    world.commit();
    assert!(world.signed.contains(&Unsigned::Mesh));

    world.node("a", 1, &[]);
    let generation = world.registry.mesh().config.generation;
    assert!(!world.registry.adopt_mesh(ours.clone()), "not newer");
    let newer = MeshConfig { generation: generation + 3, ..ours.clone() };
    assert!(world.registry.adopt_mesh(newer.clone()));
    assert_eq!(world.registry.mesh().config, newer);
    let moved = MeshConfig { generation: generation + 4, ..other_overlay };
    assert!(!world.registry.adopt_mesh(moved), "nodes have addresses in the ranges");
    let foreign = MeshConfig {
        mesh_id: towline_types::id::MeshId([0xee; 16]),
        generation: generation + 9,
        ..ours
    };
    assert!(!world.registry.adopt_mesh(foreign));
}
