//! Tests the agent's Kubernetes client against a scripted API server.
#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]
#![expect(clippy::print_stdout, reason = "the output of a test")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nix::mount::{MsFlags, mount};
use nix::sched::CloneFlags;
use tokio::sync::watch;
use towline_agent::config::{AnnouncePods, KubernetesConfig};
use towline_agent::kubernetes::{self, NodeProblem, Setup, View};
use towline_agent::state::StateDir;
use towline_fixtures::node::nets;
use towline_netlink::{Overlay, OverlayKind, Route, Rtnetlink};
use towline_proto::id::MeshId;
use towline_proto::mtu::Mtu;
use towline_tests::cluster::{ClusterCa, kubeconfig, kubeconfig_of_plugin, replace};
use towline_tests::scripted_api::{Manner, ScriptedApi};

/// Time limit of every wait.
const LIMIT: Duration = Duration::from_secs(60);
/// An address that every machine has.
const OURS: &str = "127.0.0.1";
/// Mesh that every machine joined.
const MESH: MeshId = MeshId([0x11; 16]);
/// Label of a Node that names the mesh of the cluster's pod network.
const LABEL: &str = "towline.internal/mesh";

/// Returns the reason why the Node is not available, empty if it is.
fn text(view: &View) -> String {
    view.reason.as_ref().map(ToString::to_string).unwrap_or_default()
}

struct Machine {
    directory: tempfile::TempDir,
    views: watch::Receiver<View>,
}

impl Machine {
    /// Creates a machine whose CNI is a plain bridge. It has no credentials yet.
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("cni")).unwrap();
        let bridge = r#"{"plugins": [{"type": "bridge"}]}"#;
        std::fs::write(directory.path().join("cni/10-bridge.conflist"), bridge).unwrap();
        let views = start(&directory);
        Self { directory, views }
    }

    /// Restarts the agent; the state directory keeps what it learned.
    async fn restart(&mut self) {
        // Without receivers the task ends and releases the state directory.
        self.views = watch::channel(View::default()).1;
        while StateDir::open(&self.path("state")).is_err() {
            tokio::task::yield_now().await;
        }
        self.views = start(&self.directory);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Installs a kubelet's credentials.
    fn enrol(&self, ca: &ClusterCa, url: &str, node: &str) {
        replace(&self.path("ca.crt"), ca.pem()).unwrap();
        self.rotate(ca, node);
        let text = kubeconfig(url, &self.path("ca.crt"), &self.path("kubelet.pem"));
        replace(&self.path("kubelet.conf"), &text).unwrap();
    }

    fn rotate(&self, ca: &ClusterCa, node: &str) {
        let pair = ca.issue_node(node).unwrap();
        replace(&self.path("kubelet.pem"), &pair.both()).unwrap();
    }

    async fn view(&mut self, wanted: impl Fn(&View) -> bool) -> View {
        let last = self.views.clone();
        let found = tokio::time::timeout(LIMIT, self.views.wait_for(|view| wanted(view))).await;
        match found {
            Ok(view) => view.unwrap().clone(),
            Err(_) => panic!("not seen; now: {:?}", last.borrow()),
        }
    }

    async fn pods(&mut self, wanted: &[&str]) -> View {
        let wanted = nets(wanted);
        self.view(|view| view.connected && view.facts.pods == wanted).await
    }

    async fn reason(&mut self, part: &str) -> View {
        self.view(|view| !view.connected && text(view).contains(part)).await
    }
}

fn start(directory: &tempfile::TempDir) -> watch::Receiver<View> {
    kubernetes::start(Setup {
        config: KubernetesConfig {
            kubeconfig: directory.path().join("kubelet.conf"),
            announce_pods: AnnouncePods::Auto,
            cni_dir: directory.path().join("cni"),
            ..KubernetesConfig::default()
        },
        mesh: Some(MESH),
        link: "towline0".into(),
        mtu: Mtu::DEFAULT,
        state: Arc::new(StateDir::open(&directory.path().join("state")).unwrap()),
        credentials_period: Duration::from_millis(10),
    })
}

/// A cluster with these pod networks of node `w`, and the machine of that node, whose agent follows
/// it.
struct Scene {
    ca: ClusterCa,
    api: ScriptedApi,
    machine: Machine,
}

impl Scene {
    async fn new(pods: &[&str]) -> Self {
        let ca = ClusterCa::new("cluster").unwrap();
        let api = ScriptedApi::start(&ca).await.unwrap();
        api.node("w", OURS, pods);
        let machine = Machine::new();
        machine.enrol(&ca, &api.url, "w");
        Self { ca, api, machine }
    }

    /// Creates a scene in which the agent announces `10.244.1.0/24`.
    async fn announcing() -> Self {
        let mut scene = Self::new(&["10.244.1.0/24"]).await;
        scene.machine.pods(&["10.244.1.0/24"]).await;
        scene
    }
}

#[tokio::test]
async fn credentials_are_waited_for_and_a_change_of_pod_networks_is_followed() {
    let ca = ClusterCa::new("cluster").unwrap();
    let api = ScriptedApi::start(&ca).await.unwrap();
    api.node("w", OURS, &["10.244.1.0/24"]);
    let mut machine = Machine::new();
    machine.reason("no kubelet credentials yet").await;
    machine.enrol(&ca, &api.url, "w");
    let view = machine.pods(&["10.244.1.0/24"]).await;
    assert_eq!(view.facts.node, "w");
    assert!(view.cni_text().contains("native"), "{}", view.cni_text());
    api.node("w", OURS, &["10.244.7.0/24", "fd00:7::/64"]);
    machine.pods(&["10.244.7.0/24", "fd00:7::/64"]).await;
}

#[tokio::test]
async fn a_node_reads_its_own_node_and_is_refused_every_other() {
    let Scene { api, mut machine, .. } = Scene::new(&["10.244.1.0/24"]).await;
    api.node("other", OURS, &["10.244.2.0/24"]);
    machine.pods(&["10.244.1.0/24"]).await;
    assert!(api.users().iter().all(|user| user == "system:node:w"));
}

#[tokio::test]
async fn a_server_that_refuses_goes_away_or_flaps_changes_nothing() {
    let Scene { api, mut machine, .. } = Scene::announcing().await;
    for (manner, says) in [
        (Manner::Refuses(403), "403"),
        (Manner::Refuses(401), "401"),
        (Manner::Refuses(500), "500"),
        (Manner::Away, "cannot reach the API server"),
    ] {
        api.behave(manner);
        let view = machine.reason(says).await;
        assert_eq!(view.facts.pods, nets(&["10.244.1.0/24"]), "{manner:?}");
        assert!(!text(&view).contains('\n'));
        api.behave(Manner::Proper);
        machine.pods(&["10.244.1.0/24"]).await;
    }
    api.behave(Manner::Flaps);
    api.node("w", OURS, &["10.244.2.0/24"]);
    machine.view(|view| view.facts.pods == nets(&["10.244.2.0/24"])).await;
}

#[tokio::test]
async fn the_last_good_word_outlives_a_restart_without_a_server() {
    let Scene { api, mut machine, .. } = Scene::announcing().await;
    drop(api);
    machine.reason("cannot reach the API server").await;
    machine.restart().await;
    assert_eq!(machine.views.borrow().facts.pods, nets(&["10.244.1.0/24"]));
    let view = machine.reason("cannot reach the API server").await;
    assert_eq!(view.facts.pods, nets(&["10.244.1.0/24"]));
}

#[tokio::test]
async fn a_server_of_another_cluster_is_not_believed() {
    let (ca, other) = (ClusterCa::new("cluster").unwrap(), ClusterCa::new("other").unwrap());
    let api = ScriptedApi::start(&other).await.unwrap();
    api.node("w", OURS, &["10.244.1.0/24"]);
    let mut machine = Machine::new();
    machine.enrol(&ca, &api.url, "w");
    let view = machine.reason("another cluster").await;
    assert!(view.facts.pods.is_empty());
}

#[tokio::test]
async fn a_kubeconfig_of_another_node_announces_nothing() {
    let ca = ClusterCa::new("cluster").unwrap();
    let api = ScriptedApi::start(&ca).await.unwrap();
    api.node("other", "192.0.2.77", &["10.244.9.0/24"]);
    let mut machine = Machine::new();
    machine.enrol(&ca, &api.url, "other");
    let view = machine.view(|view| !view.problems.is_empty()).await;
    assert!(matches!(view.problems[0], NodeProblem::OtherMachine { .. }), "{:?}", view.problems);
    assert!(view.facts.pods.is_empty());
}

#[tokio::test]
async fn the_pod_network_of_another_mesh_is_not_announced_and_the_reason_names_both() {
    let mut scene = Scene::announcing().await;
    let other = MeshId([0xee; 16]);
    scene.api.labelled_node("w", OURS, &["10.244.1.0/24"], &[(LABEL, &other.to_string())]);
    let view = scene.machine.pods(&[]).await;
    let texts: Vec<String> = view.problems.iter().map(ToString::to_string).collect();
    assert!(texts[0].contains(&other.to_string()) && texts[0].contains(&MESH.to_string()));
    assert_eq!(view.facts.node, "w", "the node's addresses are its own");

    scene.api.labelled_node("w", OURS, &["10.244.1.0/24"], &[(LABEL, &MESH.to_string())]);
    let view = scene.machine.pods(&["10.244.1.0/24"]).await;
    assert!(view.problems.is_empty(), "{:?}", view.problems);
}

#[tokio::test]
async fn a_kubeconfig_of_a_person_is_refused_with_its_name() {
    let ca = ClusterCa::new("cluster").unwrap();
    let api = ScriptedApi::start(&ca).await.unwrap();
    let mut machine = Machine::new();
    machine.enrol(&ca, &api.url, "w");
    let admin = ca.issue("kubernetes-admin", "system:masters", &[]).unwrap();
    replace(&machine.path("kubelet.pem"), &admin.both()).unwrap();
    let view = machine.reason("not of a node").await;
    assert!(text(&view).contains("kubernetes-admin"), "{}", text(&view));
}

#[tokio::test]
async fn a_node_without_pod_networks_keeps_the_ones_before() {
    let Scene { api, mut machine, .. } = Scene::new(&[]).await;
    machine.view(|view| view.connected && view.cni_text().contains("no pod network")).await;
    api.node("w", OURS, &["10.244.1.0/24"]);
    machine.pods(&["10.244.1.0/24"]).await;
    api.node("w", OURS, &[]);
    let view = machine.view(|view| view.cni_text().contains("no pod network")).await;
    assert_eq!(view.facts.pods, nets(&["10.244.1.0/24"]));
}

#[tokio::test]
async fn rotated_credentials_are_read_again() {
    let Scene { ca, api, mut machine } = Scene::announcing().await;
    api.node("renamed", OURS, &["10.244.2.0/24"]);
    machine.rotate(&ca, "renamed");
    let view = machine.pods(&["10.244.2.0/24"]).await;
    assert_eq!(view.facts.node, "renamed");
}

#[tokio::test]
async fn what_a_credential_plugin_prints_is_used_and_the_server_says_whose_it_is() {
    let ca = ClusterCa::new("cluster").unwrap();
    let api = ScriptedApi::start(&ca).await.unwrap();
    api.node("w", OURS, &["10.244.1.0/24"]);
    let mut machine = Machine::new();
    replace(&machine.path("ca.crt"), ca.pem()).unwrap();
    let credential = machine.path("credential.json");
    let enrol = |machine: &Machine, command: &[&str]| {
        let text = kubeconfig_of_plugin(&api.url, &machine.path("ca.crt"), command);
        replace(&machine.path("kubelet.conf"), &text).unwrap();
    };
    let print = ["cat", credential.to_str().unwrap()];
    let fails = ["sh", "-c", "echo no luck >&2; exit 3"];
    enrol(&machine, &fails);
    let view = machine.reason("cannot be used").await;
    assert!(text(&view).contains("kubelet.conf") && !text(&view).contains('\n'), "{view:?}");

    let person = ca.issue("kubernetes-admin", "system:masters", &[]).unwrap();
    replace(&credential, &person.of_plugin()).unwrap();
    enrol(&machine, &print);
    let view = machine.reason("not of a node").await;
    assert!(text(&view).contains("kubernetes-admin"), "{}", text(&view));

    replace(&credential, &ca.issue_node("w").unwrap().of_plugin()).unwrap();
    enrol(&machine, &print);
    let view = machine.pods(&["10.244.1.0/24"]).await;
    assert_eq!(view.facts.node, "w");
}

#[tokio::test]
async fn a_clock_that_is_off_is_named_and_not_the_server() {
    let ca = ClusterCa::new("cluster").unwrap();
    let (hour, day) = (Duration::from_secs(3_600), Duration::from_secs(86_400));
    let now = SystemTime::now();
    for (from, why) in [(now + hour, "not valid yet"), (now - day - hour, "expired")] {
        let api = ScriptedApi::start_valid_from(&ca, from).await.unwrap();
        let mut machine = Machine::new();
        machine.enrol(&ca, &api.url, "w");
        let view = machine.reason("clock").await;
        assert!(text(&view).contains(why) && !text(&view).contains('\n'), "{}", text(&view));
    }
}

#[tokio::test]
async fn another_cni_is_seen_while_the_agent_runs() {
    let Scene { api: _api, mut machine, .. } = Scene::announcing().await;
    // It sorts before the bridge's configuration, so that container runtimes use it.
    let other = r#"{"plugins": [{"type": "somebodys-own"}]}"#;
    replace(&machine.path("cni/05-other.conflist"), other).unwrap();
    let view = machine.view(|view| view.cni_text().contains("somebodys-own")).await;
    assert_eq!(view.facts.pods, nets(&["10.244.1.0/24"]), "until it is known what it does");
    let routes = r#"{"plugins": [{"type": "ptp"}]}"#;
    replace(&machine.path("cni/05-other.conflist"), routes).unwrap();
    machine.view(|view| view.cni_text().contains("ptp (native routing)")).await;
}

/// Runs a future on its own thread in new namespaces. Returns `false` if this machine forbids them.
fn in_namespaces(flags: CloneFlags, body: impl Future<Output = ()> + Send + 'static) -> bool {
    let thread = std::thread::spawn(move || {
        if let Err(error) = nix::sched::unshare(flags) {
            println!("skipped: cannot create namespaces: {error}");
            return false;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(body);
        true
    });
    thread.join().unwrap()
}

#[test]
fn a_cni_that_begins_to_tunnel_takes_the_pod_networks_out_of_the_mesh() {
    in_namespaces(CloneFlags::CLONE_NEWNET, async {
        let mut netlink = Rtnetlink::open().unwrap();
        let loopback = netlink.link_index("lo").unwrap();
        netlink.set_up(loopback, true).unwrap();
        let Scene { api: _api, mut machine, .. } = Scene::announcing().await;
        let vxlan = Overlay {
            kind: OverlayKind::Vxlan,
            id: 1,
            remote: "192.0.2.1".parse().unwrap(),
            port: 4_789,
        };
        if let Err(error) = netlink.add_overlay("flannel.1", vxlan) {
            return println!("skipped: cannot create a VXLAN link: {error}");
        }
        let link = netlink.link_index("flannel.1").unwrap();
        netlink.set_up(link, true).unwrap();
        // By this route it is known that pods use the link, which is not the bridge plugin's own.
        let route = Route::new("10.244.2.0/24".parse().unwrap()).dev(link);
        netlink.add_route(&route).unwrap();
        let view = machine.view(|view| view.cni_text().contains("vxlan flannel.1")).await;
        assert!(view.facts.pods.is_empty());
        assert!(view.cni_text().contains("mtu to set 1370"), "{}", view.cni_text());
        netlink.delete_link(link).unwrap();
        machine.pods(&["10.244.1.0/24"]).await;
    });
}

#[test]
fn a_full_disk_is_said_and_what_is_in_force_stays() {
    in_namespaces(CloneFlags::CLONE_NEWNS, async {
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let Scene { api, mut machine, .. } = Scene::announcing().await;
        let kept = machine.path("state/kubernetes.json");
        let word = std::fs::read(&kept).unwrap();
        // Mount a small file system over the directory, which the stored state fills.
        let state = machine.path("state");
        mount(Some("disk"), &state, Some("tmpfs"), MsFlags::empty(), Some("size=8k")).unwrap();
        std::fs::write(&kept, &word).unwrap();
        let filler = machine.path("state/filler");
        while std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&filler)
            .and_then(|mut file| std::io::Write::write_all(&mut file, &[0; 512]))
            .is_ok()
        {}
        api.node("w", OURS, &["10.244.2.0/24"]);
        let view = machine.pods(&["10.244.2.0/24"]).await;
        assert!(view.problems[0].to_string().contains("No space left"), "{:?}", view.problems);
        assert_eq!(std::fs::read(&kept).unwrap(), word, "the last state that was stored");
        std::fs::remove_file(&filler).unwrap();
        api.node("w", OURS, &["10.244.3.0/24"]);
        machine.view(|view| view.connected && view.problems.is_empty()).await;
        assert!(String::from_utf8(std::fs::read(&kept).unwrap()).unwrap().contains("10.244.3.0"));
    });
}
