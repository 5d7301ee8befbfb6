//! The writer on a store that other controllers use, too, without etcd.

use std::collections::BTreeMap;

use super::tests::{create_token, new_ledger, published};
use super::*;
use crate::state_dir::StateDir;
use crate::store::{CommitError, Write};

/// A store in memory, of which the test plays the other controllers.
#[derive(Clone, Default)]
struct Memory(Arc<Mutex<Content>>);

#[derive(Default)]
struct Content {
    records: BTreeMap<String, Vec<u8>>,
    sequence: u64,
    /// Records that other controllers wrote, until they are read.
    written: Vec<Write>,
    has_turn: bool,
    /// Number of turns that were begun.
    turns: usize,
    /// Number of reads outside of a turn.
    peeks: usize,
    /// True if all reads fail.
    is_unreadable: bool,
}

impl Content {
    fn begin(&mut self) {
        self.turns += usize::from(!self.has_turn);
        self.has_turn = true;
    }

    fn check(&self) -> Result<(), OpenError> {
        if self.is_unreadable { Err(EtcdError::Empty("memory".to_owned()).into()) } else { Ok(()) }
    }
}

impl Store for Memory {
    fn name(&self) -> String {
        "memory".to_owned()
    }

    fn sequence(&self) -> u64 {
        self.0.lock().sequence
    }

    fn load(&mut self) -> Result<Vec<Record>, OpenError> {
        let content = self.0.lock();
        content.check()?;
        Ok(content.records.clone().into_iter().collect())
    }

    fn commit(&mut self, expected: u64, writes: &[Write]) -> Result<u64, CommitError> {
        let mut content = self.0.lock();
        assert!(content.has_turn && content.sequence == expected);
        content.has_turn = false;
        content.sequence += 1;
        for (key, value) in writes {
            match value {
                Some(value) => drop(content.records.insert(key.clone(), value.clone())),
                None => drop(content.records.remove(key)),
            }
        }
        Ok(content.sequence)
    }

    fn reopen(&mut self) -> Result<(), OpenError> {
        self.0.lock().begin();
        Ok(())
    }

    fn share(&mut self) -> bool {
        true
    }

    fn begin_turn(&mut self) -> Result<(), OpenError> {
        self.0.lock().begin();
        Ok(())
    }

    fn end_turn(&mut self) {
        self.0.lock().has_turn = false;
    }

    fn peek(&mut self) -> Result<Option<Vec<Record>>, OpenError> {
        self.0.lock().peeks += 1;
        self.load().map(Some)
    }

    fn changes(&mut self) -> Result<Vec<Write>, OpenError> {
        let mut content = self.0.lock();
        content.check()?;
        Ok(std::mem::take(&mut content.written))
    }
}

/// A writer's thread that the test calls itself, and its store.
struct Scene {
    thread: Thread,
    store: Memory,
    _root: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::new(root.path());
        let authority = Arc::new(Authority::load_or_create(&dir, true, 0).unwrap());
        let mut ledger = new_ledger(&authority);
        let mut store = Memory::default();
        store.begin_turn().unwrap();
        store.commit(0, &ledger.take_changes(BTreeMap::new).writes).unwrap();
        store.0.lock().turns = 0;
        let thread = Thread::new(Box::new(store.clone()), ledger, authority, false, published());
        Self { thread, store, _root: root }
    }

    /// Lets another controller write something that this one cannot use.
    fn write_unusable(&self) {
        let mut content = self.store.0.lock();
        content.written.push(("seen".to_owned(), Some(b"of another store.key".to_vec())));
        content.records.insert("seen".to_owned(), b"of another store.key".to_vec());
    }

    /// Creates a token. Returns whether that succeeded.
    fn create_token(&mut self, id: u8) -> bool {
        let (answer, mut answered) = oneshot::channel();
        let job: Job = Box::new(move |state| match state {
            Ok((ledger, sessions, now)) => {
                let created = create_token(id)(ledger, sessions, now);
                Some(Box::new(move |stored: Result<(), Unavailable>| {
                    let _ = answer.send(stored.is_ok() && created);
                }))
            }
            Err(_) => {
                let _ = answer.send(false);
                None
            }
        });
        self.thread.serve(vec![job]);
        answered.try_recv().unwrap()
    }

    /// Returns whether the controller has everything that is in the store at a time after `since`.
    fn is_current_after(&self, since: Option<Instant>) -> bool {
        self.thread.published.counters.current_at() > since
    }

    /// Returns whether the controller has the turn, how many it began, and how often it read outside of one.
    fn turns(&self) -> (bool, usize, usize) {
        let content = self.store.0.lock();
        (content.has_turn, content.turns, content.peeks)
    }
}

#[test]
fn a_controller_that_cannot_use_the_store_holds_no_turn_and_begins_no_other_one() {
    let mut scene = Scene::new();
    assert!(scene.thread.refresh());
    scene.write_unusable();
    assert!(!scene.thread.refresh());
    assert_eq!(scene.turns(), (false, 1, 0), "the turn in which it was found out has ended");
    assert!(!scene.thread.refresh() && !scene.create_token(1));
    assert_eq!(scene.turns(), (false, 1, 0), "nothing is read for a while");

    // The pause is over.
    let end_pause = |scene: &mut Scene| {
        scene.thread.unusable.as_mut().unwrap().retry_at = clock::now().mono;
    };
    end_pause(&mut scene);
    assert!(!scene.thread.refresh());
    assert_eq!(scene.turns(), (false, 1, 1), "it is read outside of a turn first");
    assert!(!scene.create_token(1));
    assert_eq!(scene.turns(), (false, 1, 1), "another pause began");

    scene.store.0.lock().records.remove("seen");
    end_pause(&mut scene);
    assert!(scene.thread.refresh() && scene.create_token(1));
    assert_eq!(scene.turns(), (false, 3, 2));
}

#[test]
fn a_controller_that_cannot_follow_the_store_begins_no_turn_for_requests() {
    let mut scene = Scene::new();
    assert!(scene.create_token(1));
    assert_eq!(scene.turns(), (false, 1, 0));
    scene.store.0.lock().is_unreadable = true;
    assert!(!scene.create_token(2));
    assert_eq!(scene.turns(), (false, 2, 0), "the turn in which it was found out has ended");
    assert!(!scene.thread.refresh() && !scene.create_token(2));
    assert_eq!(scene.turns(), (false, 2, 0));
    scene.store.0.lock().is_unreadable = false;
    assert!(scene.create_token(2));
    assert_eq!(scene.turns(), (false, 3, 0));
}

#[test]
fn only_a_controller_that_has_all_of_the_store_is_current() {
    let mut scene = Scene::new();
    assert!(!scene.is_current_after(None));
    assert!(scene.thread.refresh() && scene.is_current_after(None));
    let last = scene.thread.published.counters.current_at();
    scene.store.0.lock().is_unreadable = true;
    assert!(!scene.thread.refresh() && !scene.create_token(1));
    assert!(!scene.is_current_after(last), "the store cannot be read");
    scene.store.0.lock().is_unreadable = false;
    scene.write_unusable();
    assert!(!scene.thread.refresh() && !scene.create_token(1));
    assert!(!scene.is_current_after(last), "its content cannot be used");
    scene.store.0.lock().records.remove("seen");
    scene.thread.unusable = None;
    assert!(scene.thread.refresh() && scene.is_current_after(last));
}
