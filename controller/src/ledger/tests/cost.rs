//! What a change costs, from the registry to what is sent: it does not grow with the mesh.

use super::*;

/// Cost of one commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cost {
    /// Number of records that are stored.
    records: usize,
    /// Bytes of these records.
    stored: usize,
    /// Number of changes that a watch is sent.
    changes: usize,
    /// Bytes that are encoded for all watches together.
    encoded: u64,
}

/// Returns what a changed record, the same one with a new generation, a join and a removal cost in a mesh of this
/// size.
fn costs(size: u8) -> Vec<Cost> {
    let mut world = World::new();
    for number in 1..=size {
        world.node(number);
    }
    let mut costs = Vec::new();
    let mut measure = |work: &dyn Fn(&mut World)| {
        let (encoded, cursor) = (world.map.encoded_bytes(), world.map.revision());
        work(&mut world);
        let (records, stored) = world.written;
        let (message, is_all) = world.map.changes_after(cursor);
        assert!(is_all);
        let changes = message.changes.len();
        // All watches share the bytes.
        let again = world.map.changes_after(cursor).0;
        for (first, second) in message.changes.iter().zip(&again.changes) {
            assert_eq!(first.as_ptr(), second.as_ptr());
        }
        costs.push(Cost { records, stored, changes, encoded: world.map.encoded_bytes() - encoded });
    };
    // Field 900, a number: 1.
    let field = [0xa0, 0x38, 1];
    for generation in [2, 3] {
        measure(&|world| {
            world.publish_with(1, generation, &field).unwrap();
        });
    }
    measure(&|world| {
        world.node(size + 1);
    });
    measure(&|world| {
        let (sessions, now) = (&world.sessions, world.now);
        world.ledger.registry().remove(NodeId([2; 16]), "test", sessions, now).unwrap();
        world.commit();
    });
    costs
}

#[test]
fn bytes_that_are_stored_and_encoded_for_a_change_do_not_grow_with_the_mesh() {
    /// Difference that longer numbers and names may make, in bytes.
    const NUMBERS: u64 = 64;
    let (small, large) = (costs(10), costs(200));
    for (few, many) in small.iter().zip(&large) {
        assert_eq!((few.records, few.changes), (many.records, many.changes), "{few:?} {many:?}");
        assert!(few.encoded.abs_diff(many.encoded) < NUMBERS, "{few:?} {many:?}");
        assert!((few.stored.abs_diff(many.stored) as u64) < NUMBERS, "{few:?} {many:?}");
    }
    assert!(large.iter().all(|cost| cost.records <= 4 && cost.changes <= 2), "{large:?}");
    assert!(large[0].encoded > 0, "{large:?}");
}
