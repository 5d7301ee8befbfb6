//! What every store promises, as one test.

use super::{CommitError, Store, Write};

/// Checks a store. `create` makes a new one with records, `open` opens it again after it was dropped.
pub(super) fn check(
    create: impl Fn(&[Write]) -> Box<dyn Store>,
    open: impl Fn() -> Box<dyn Store>,
) {
    let mut store = create(&[put("b", "1"), put("a", "1")]);
    let first = store.sequence();
    assert_eq!(texts(&mut *store), ["a=1", "b=1"], "sorted by key");

    let second = store.commit(first, &[put("c", "2"), remove("a"), put("b", "2")]).unwrap();
    assert!(second > first);
    drop(store);
    let mut store = open();
    assert_eq!(store.sequence(), second);
    assert_eq!(texts(&mut *store), ["b=2", "c=2"], "a commit outlives the store");

    let error = store.commit(first, &[put("a", "3")]).unwrap_err();
    assert!(
        matches!(error, CommitError::Conflict { expected, found } if (expected, found) == (first, second)),
        "{error}"
    );
    store.reopen().unwrap();
    assert_eq!(texts(&mut *store), ["b=2", "c=2"], "a stale commit changes nothing");

    // More records and bytes than one transaction of etcd takes.
    let many: Vec<Write> =
        (0..700).map(|n| put(&format!("node/{n:04}"), &"x".repeat(4000))).collect();
    let third = store.commit(second, &many).unwrap();
    let expected = |from: usize| -> Vec<String> {
        let nodes = (from..700).map(|n| format!("node/{n:04}={}", "x".repeat(4000)));
        ["b=2", "c=2"].map(String::from).into_iter().chain(nodes).collect()
    };
    assert!(texts(&mut *store) == expected(0), "a large commit is complete");
    let fewer: Vec<Write> = (0..650).map(|n| remove(&format!("node/{n:04}"))).collect();
    let fourth = store.commit(third, &fewer).unwrap();
    drop(store);
    let mut store = open();
    assert_eq!(store.sequence(), fourth);
    assert!(texts(&mut *store) == expected(650), "many records are removed at once");

    let fifth = store.commit(fourth, &[]).unwrap();
    assert!(fifth > fourth, "an empty commit is one, too");
    let sixth = store.commit(fifth, &[put("seen", &"y".repeat(500_000))]).unwrap();
    store.reopen().unwrap();
    assert_eq!(store.sequence(), sixth);
    assert!(texts(&mut *store).last().is_some_and(|last| last.len() == 500_005));
}

/// Returns the write of a text.
pub(super) fn put(key: &str, value: &str) -> Write {
    (key.to_owned(), Some(value.as_bytes().to_vec()))
}

fn remove(key: &str) -> Write {
    (key.to_owned(), None)
}

/// Returns the records as `key=value`.
pub(super) fn texts(store: &mut dyn Store) -> Vec<String> {
    let text = |(key, value)| format!("{key}={}", String::from_utf8(value).unwrap());
    store.load().unwrap().into_iter().map(text).collect()
}
