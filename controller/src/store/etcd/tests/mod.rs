//! The store against real etcd servers. Where there is no etcd, each test says so and passes.

mod cluster;
mod replicas;

use prost::Message;

use super::layout::{self, Head, Keys, Plan, Staged};
use super::wire::{self, PutRequest, PutResponse, RangeRequest, RangeResponse};
use super::*;
use crate::store::conformance::{self, put, texts};
use crate::store::{Location, Place};
use cluster::Cluster;

/// Request to forget the states before a revision.
#[derive(Clone, Copy, PartialEq, prost::Message)]
struct CompactionRequest {
    #[prost(int64, tag = "1")]
    revision: i64,
    #[prost(bool, tag = "2")]
    physical: bool,
}

/// Request of the RPCs that add a user (`first` is the name, `second` the password), add a role (`first`) and
/// give a user (`first`) a role (`second`).
#[derive(Clone, PartialEq, prost::Message)]
struct AuthRequest {
    #[prost(string, tag = "1")]
    first: String,
    #[prost(string, tag = "2")]
    second: String,
}

/// Request to allow a role the keys of a range.
#[derive(Clone, PartialEq, prost::Message)]
struct GrantRequest {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    permission: Option<Permission>,
}

/// Permission for the keys of a range.
#[derive(Clone, PartialEq, prost::Message)]
struct Permission {
    /// 0: read, 2: read and write.
    #[prost(int32, tag = "1")]
    kind: i32,
    #[prost(bytes = "bytes", tag = "2")]
    key: bytes::Bytes,
    #[prost(bytes = "bytes", tag = "3")]
    range_end: bytes::Bytes,
}

/// Response that is not read.
#[derive(Clone, Copy, PartialEq, prost::Message)]
struct Ignored {}

fn identity() -> Identity {
    Identity { mesh: "mesh".to_owned(), ca: "ca".to_owned() }
}

fn create(cluster: &Cluster, prefix: &str, records: &[Write]) -> EtcdStore {
    let mut store = EtcdStore::connect(cluster.settings(prefix)).unwrap();
    assert!(!store.has_mesh());
    store.create(&identity(), records).unwrap();
    store
}

/// Commits a write, as the writer does when members fail: after a failure it opens the store again.
fn write_through(store: &mut EtcdStore, write: Write) {
    let writes = [write];
    let committed = (0..10).any(|_| {
        let sequence = store.sequence();
        store.commit(sequence, &writes).is_ok() || {
            // If it fails too, the next commit finds that out.
            let _ = store.reopen();
            false
        }
    });
    assert!(committed, "two members decide");
}

/// Writes a key as another process would.
fn write(cluster: &Cluster, key: bytes::Bytes, value: Vec<u8>) {
    let request = PutRequest { key, value: value.into(), lease: 0 };
    cluster.call::<_, PutResponse>(wire::PUT, request).unwrap();
}

/// Returns the head of a store.
fn head(cluster: &Cluster, keys: &Keys) -> Head {
    let request = RangeRequest::of(keys.head());
    let answer: RangeResponse = cluster.call(wire::RANGE, request).unwrap();
    Head::read(&answer.kvs[0].value, "test").unwrap()
}

fn line(error: &dyn std::error::Error) -> String {
    let line = error.to_string();
    assert!(!line.contains('\n'), "{line}");
    line
}

#[test]
fn one_member_is_a_store() {
    let Some(cluster) = Cluster::start(1, &[]) else { return };
    let place =
        || Place::open(&Location::Etcd(cluster.settings("m/one")), "unused".into()).unwrap();
    conformance::check(
        |records| place().create(&identity(), records).unwrap(),
        || place().store(&identity()).unwrap(),
    );
    let records = EtcdStore::read(cluster.settings("m/one")).unwrap();
    assert_eq!(records.len(), 53);
    let error = EtcdStore::read(cluster.settings("m")).unwrap_err();
    assert!(line(&error).contains("has no mesh"), "a prefix is not another one's beginning");
}

#[test]
fn three_members_are_a_store_as_long_as_two_of_them_live() {
    let Some(mut cluster) = Cluster::start(3, &[]) else { return };
    let place = || Place::open(&Location::Etcd(cluster.settings("m")), "unused".into()).unwrap();
    conformance::check(
        |records| place().create(&identity(), records).unwrap(),
        || place().store(&identity()).unwrap(),
    );
    let mut store = create(&cluster, "n", &[put("a", "0")]);
    // The first one is connected to.
    cluster.pause(0);
    write_through(&mut store, put("a", "1"));
    cluster.resume(0);
    cluster.kill(0);
    write_through(&mut store, put("a", "2"));
    assert_eq!(texts(&mut store), ["a=2"]);

    cluster.pause(1);
    let sequence = store.sequence();
    let error = store.commit(sequence, &[put("a", "3")]).unwrap_err();
    assert!(matches!(error, CommitError::Etcd(_)), "{error}");
    line(&error);
    cluster.resume(1);
    assert!((0..10).any(|_| store.reopen().is_ok()), "the members decide again");
    let expected = if store.sequence() == sequence { "a=2" } else { "a=3" };
    assert_eq!(texts(&mut store), [expected], "all of the commit or nothing");
    write_through(&mut store, put("a", "4"));
    assert_eq!(texts(&mut store), ["a=4"]);
}

#[test]
fn one_controller_uses_a_store_and_it_is_that_of_its_mesh() {
    let Some(cluster) = Cluster::start(1, &[]) else { return };
    let mut store = create(&cluster, "m", &[put("a", "1")]);
    let error = EtcdStore::connect(cluster.settings("m")).map(drop).unwrap_err();
    assert!(line(&error).contains(&format!("(pid {}", std::process::id())), "{error}");
    assert!(matches!(error, EtcdError::InUse { .. }));
    let again = store.create(&identity(), &[]).unwrap_err();
    assert!(matches!(again, EtcdError::NotEmpty(_)), "{again}");

    // A controller that took over keeps out the writes of the previous one.
    let owner = Keys::new("/m/".to_owned()).owner();
    write(&cluster, owner.clone(), b"another".to_vec());
    let sequence = store.sequence();
    let error = store.commit(sequence, &[put("a", "2")]).unwrap_err();
    assert!(line(&error).contains("in use by the controller another"), "{error}");
    assert!(store.reopen().is_err());
    let delete = wire::TxnRequest {
        compare: Vec::new(),
        success: vec![wire::RequestOp::delete(owner, bytes::Bytes::new())],
        failure: Vec::new(),
    };
    cluster.call::<_, wire::TxnResponse>(wire::TXN, delete).unwrap();
    store.reopen().unwrap();
    assert_eq!(texts(&mut store), ["a=1"]);
    drop(store);

    let store = EtcdStore::connect(cluster.settings("m")).unwrap();
    store.check(&identity()).unwrap();
    let mesh = store.check(&Identity { mesh: "other".to_owned(), ..identity() }).unwrap_err();
    assert!(line(&mesh).contains("has the mesh mesh, but ca.crt is of the mesh other"), "{mesh}");
    let ca = store.check(&Identity { ca: "other".to_owned(), ..identity() }).unwrap_err();
    assert!(line(&ca).contains("give every controller of a mesh the same ca.key"), "{ca}");
    let empty = EtcdStore::connect(cluster.settings("empty")).unwrap();
    assert!(matches!(empty.check(&identity()), Err(EtcdError::Empty(_))));
}

#[test]
fn a_large_change_is_complete_after_a_crash_or_never_began() {
    let Some(cluster) = Cluster::start(1, &[]) else { return };
    let keys = Keys::new("/m/".to_owned());
    drop(create(&cluster, "m", &[put("a", "1"), put("b", "1")]));
    let Plan::Staged(parts) = layout::plan(
        &keys,
        &(0..300)
            .map(|n| put(&format!("node/{n:03}"), "x"))
            .chain([put("a", "2")])
            .collect::<Vec<_>>(),
    )
    .unwrap() else {
        panic!("it fits in one transaction")
    };
    let staged = Staged { id: 77, parts: 1 };
    assert_eq!(parts.len(), 1);

    // The parts without the head: the change was never committed.
    write(&cluster, keys.part(staged.id, 0), parts[0].to_vec());
    let mut store = EtcdStore::connect(cluster.settings("m")).unwrap();
    assert_eq!(texts(&mut store), ["a=1", "b=1"]);
    drop(store);
    let left: RangeResponse =
        cluster.call(wire::RANGE, RangeRequest::of(keys.part(staged.id, 0))).unwrap();
    assert!(left.kvs.is_empty(), "what nobody committed is removed");

    // With the head: it was committed, and not yet copied.
    write(&cluster, keys.part(staged.id, 0), parts[0].to_vec());
    let after = head(&cluster, &keys).after(staged.id, Some(staged));
    write(&cluster, keys.head(), after.encode_to_vec());
    let read = EtcdStore::read(cluster.settings("m")).unwrap();
    assert_eq!(read.len(), 302, "a reader that is no owner sees it, too");
    let mut store = EtcdStore::connect(cluster.settings("m")).unwrap();
    assert_eq!(store.sequence(), after.sequence);
    assert_eq!(store.load().unwrap(), read);
    assert_eq!(head(&cluster, &keys).staged, None);
    store.commit(after.sequence, &[put("b", "2")]).unwrap();
}

#[test]
fn what_is_compacted_full_or_older_than_known_is_one_clear_line() {
    let Some(cluster) = Cluster::start(1, &["--quota-backend-bytes", "16777216"]) else { return };
    let keys = Keys::new("/m/".to_owned());
    let mut store = create(&cluster, "m", &[put("a", "1")]);
    let old = head(&cluster, &keys);
    let sequence = store.sequence();
    let sequence = store.commit(sequence, &[put("a", "2")]).unwrap();

    let newest: RangeResponse = cluster.call(wire::RANGE, RangeRequest::of(keys.head())).unwrap();
    let revision = newest.header.unwrap().revision;
    let compact = CompactionRequest { revision, physical: true };
    cluster.call::<_, Ignored>("/etcdserverpb.KV/Compact", compact).unwrap();
    let at = |revision| {
        let request = RangeRequest { revision, ..RangeRequest::of(keys.head()) };
        cluster.call::<_, RangeResponse>(wire::RANGE, request)
    };
    assert!(matches!(at(1), Err(EtcdError::Compacted)));
    let future = at(revision + 1000).unwrap_err();
    assert!(line(&future).contains("future revision"), "{future}");
    assert_eq!(texts(&mut store), ["a=2"], "the newest state is never compacted");

    write(&cluster, keys.head(), old.encode_to_vec());
    let error = store.commit(sequence, &[put("a", "3")]).unwrap_err();
    line(&error);
    let mut lost = Store::lost(&mut store).unwrap();
    let error = store.reopen().unwrap_err();
    assert!(line(&error).contains("restored from a snapshot: restart the controller"), "{error}");
    assert!(lost.try_recv().is_ok(), "the use of the store ends");
    drop(store);

    let mut store = create(&cluster, "n", &[]);
    let mut full = None;
    for n in 0..40 {
        let sequence = store.sequence();
        match store.commit(sequence, &[put(&format!("k{n}"), &"x".repeat(900_000))]) {
            Ok(_) => {}
            Err(error) => {
                full = Some(error);
                break;
            }
        }
    }
    let full = full.expect("the quota is reached");
    assert!(line(&full).contains("etcd is full"), "{full}");
    let sequence = store.sequence();
    store.reopen().unwrap();
    assert_eq!(store.sequence(), sequence, "what was refused is not in it");
    let records = u64::try_from(store.load().unwrap().len()).unwrap();
    assert!(records > 0 && records < sequence, "a full etcd can be read: {records} {sequence}");
}

#[test]
fn a_slow_etcd_is_one_clear_line_and_changes_nothing() {
    let Some(cluster) = Cluster::start(1, &[]) else { return };
    let mut store = create(&cluster, "m", &[put("a", "1")]);
    let sequence = store.sequence();
    cluster.pause(0);
    let error = store.commit(sequence, &[put("a", "2"), put("b", "2")]).unwrap_err();
    assert!(line(&error).contains("is slow: no answer within 2 s: check its disk"), "{error}");
    cluster.resume(0);
    // etcd may have received the commit, and then executes it as a whole.
    assert!((0..10).any(|_| store.reopen().is_ok()));
    let is_written = store.sequence() != sequence;
    let expected: &[&str] = if is_written { &["a=2", "b=2"] } else { &["a=1"] };
    assert_eq!(texts(&mut store), expected);
    write_through(&mut store, put("a", "3"));
    assert_eq!(texts(&mut store)[0], "a=3");
}

#[test]
fn a_wrong_certificate_is_one_clear_line() {
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let tls = cluster::certificates(ours.path());
    let Some(cluster) = Cluster::start_with(1, &[], Some(&tls)) else { return };
    let mut store = create(&cluster, "m", &[put("a", "1")]);
    assert_eq!(texts(&mut store), ["a=1"]);
    let others = cluster::certificates(theirs.path()).client;
    let connect = |tls: TlsFiles| {
        let settings = EtcdSettings { tls: Some(tls), ..cluster.settings("m") };
        line(&EtcdStore::connect(settings).map(drop).unwrap_err())
    };
    let wrong_ca = connect(TlsFiles { ca: others.ca.clone(), ..tls.client.clone() });
    let wrong_client = connect(TlsFiles { client: others.client, ..tls.client.clone() });
    let no_client = connect(TlsFiles { client: None, ..tls.client.clone() });
    assert!(wrong_ca.contains("correct `ca`, `certificate` and `key`"), "{wrong_ca}");
    // In TLS 1.3 a server refuses a client after the handshake. Its alert may come too late to be read.
    for error in [wrong_client, no_client] {
        assert!(error.contains("correct `ca`") || error.contains("cannot reach"), "{error}");
    }
    let missing = connect(TlsFiles { ca: theirs.path().join("none"), client: None });
    assert!(missing.contains("cannot use") && missing.contains("none"), "{missing}");
}

#[test]
fn a_user_needs_its_password_and_may_be_limited_to_one_mesh() {
    let Some(cluster) = Cluster::start(1, &[]) else { return };
    let auth = |rpc: &'static str, first: &str, second: &str| {
        let request = AuthRequest { first: first.to_owned(), second: second.to_owned() };
        cluster.call::<_, Ignored>(rpc, request).unwrap();
    };
    for (user, kind) in [("root", 2), ("towline", 2), ("reader", 0)] {
        auth("/etcdserverpb.Auth/UserAdd", user, "secret");
        auth("/etcdserverpb.Auth/RoleAdd", user, "");
        auth("/etcdserverpb.Auth/UserGrantRole", user, user);
        let permission = Permission { kind, key: "/m/".into(), range_end: "/m0".into() };
        let grant = GrantRequest { name: user.to_owned(), permission: Some(permission) };
        if user != "root" {
            cluster.call::<_, Ignored>("/etcdserverpb.Auth/RoleGrantPermission", grant).unwrap();
        }
    }
    auth("/etcdserverpb.Auth/AuthEnable", "", "");

    let directory = tempfile::tempdir().unwrap();
    let connect = |prefix: &str, user: &str, password: &str| {
        let file = directory.path().join(user);
        std::fs::write(&file, format!("{password}\n")).unwrap();
        let login = Some(LoginFile { user: user.to_owned(), password: file });
        EtcdStore::connect(EtcdSettings { login, ..cluster.settings(prefix) })
    };
    let refused = |prefix: &str, user: &str, password: &str| {
        let line = line(&connect(prefix, user, password).map(drop).unwrap_err());
        assert!(!line.contains("wrong") && !line.contains("secret"), "{line}");
        line
    };
    let mut store = connect("m", "towline", "secret").unwrap();
    store.create(&identity(), &[put("a", "1")]).unwrap();
    assert_eq!(texts(&mut store), ["a=1"]);
    drop(store);
    assert!(refused("m", "towline", "wrong").contains("cannot log in to etcd"));
    assert!(refused("m", "nobody", "wrong").contains("cannot log in to etcd"));
    let reader = refused("m", "reader", "secret");
    assert!(reader.contains("the user `reader`: permission denied: grant it read and write"));
    assert!(refused("other", "towline", "secret").contains("that begin with `/other/`"));
    let nobody = line(&EtcdStore::connect(cluster.settings("m")).map(drop).unwrap_err());
    assert!(nobody.contains("cannot log in to etcd: user name is empty"), "{nobody}");
}
