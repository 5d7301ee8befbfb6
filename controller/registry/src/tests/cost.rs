//! Tests of what a change costs.

use super::*;

/// Returns the numbers of nodes that a join, a changed record, an equal one, a withheld claim and a
/// removal read or write in a mesh of `size` nodes.
fn cost(size: u16) -> Vec<u64> {
    let overlay_v4 = "198.18.0.0/16".parse().unwrap();
    let mut world = World::of(MeshConfig { overlay_v4, ..mesh_config() });
    let prefixes = nets(&["10.0.0.0/8"]);
    let token = world.token(TokenTerms {
        uses: u32::from(size) + 9,
        allowed_prefixes: prefixes,
        ..terms()
    });
    let block = |number: u16| {
        let [high, low] = number.to_be_bytes();
        IpNet::new([10, high, low, 0].into(), 24).unwrap()
    };
    let add = |world: &mut World, number: u16| {
        let node = world.join(token, &format!("n{number}"), number).unwrap();
        world.open(node);
        world.publish(node, 1, &[block(number)]).unwrap();
        node
    };
    let first = add(&mut world, 1);
    for number in 2..=size {
        add(&mut world, number);
    }
    let mut costs = Vec::new();
    let mut measure = |world: &mut World, work: &mut dyn FnMut(&mut World)| {
        let before = world.registry.touched();
        work(world);
        costs.push(world.registry.touched() - before);
    };
    let mut last = None;
    measure(&mut world, &mut |world| last = Some(add(world, size + 1)));
    let last = last.unwrap();
    measure(&mut world, &mut |world| drop(world.publish(last, 2, &[block(size + 2)])));
    measure(&mut world, &mut |world| drop(world.publish(last, 3, &[block(size + 2)])));
    measure(&mut world, &mut |world| drop(world.publish(last, 4, &[block(1)])));
    measure(&mut world, &mut |world| drop(world.remove(first)));
    costs
}

#[test]
fn the_cost_of_a_change_does_not_grow_with_the_mesh() {
    let small = cost(20);
    assert_eq!(cost(500), small);
    assert!(small.iter().all(|touched| *touched < 40), "{small:?}");
}
