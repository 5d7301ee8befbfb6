//! Faults of a Kubernetes node. Its API server is a scripted one on the same host.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use anyhow::Context as _;
use tokio::sync::oneshot;
use towline_netlink::{Overlay, OverlayKind};

use super::ask::{View, ask};
use super::{Case, Outcome};
use crate::cluster::{ClusterCa, kubeconfig, replace};
use crate::lab::mesh::{Controller, Node};
use crate::lab::scenario::Setting;
use crate::lab::scenario::scene::{Scene, change, settled};
use crate::lab::topology::Host;
use crate::scripted_api::ScriptedApi;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new(
            "pods/cni-mtu",
            "The link of the CNI has a larger MTU than fits into the tunnel",
            "cni-mtu-too-large",
            cni_mtu,
        ),
        Case::new(
            "pods/node-ip",
            "The kubelet uses an address that the mesh does not reach",
            "node-ip-unreached",
            |setting, case| {
                let machine = Machine::join(setting)?;
                machine.api.set_node("192.168.1.10");
                ask(case, &[View::new(&machine.worker, "cp")])
            },
        ),
    ]
}

/// Pod network of the worker.
const PODS: &str = "10.244.1.0/24";

/// A worker that is a Kubernetes node, in a mesh with a control plane. Fields are dropped in this order.
struct Machine {
    worker: Node,
    _cp: Node,
    _controller: Controller,
    api: ApiServer,
    scene: Scene,
}

impl Machine {
    /// Builds the hosts, starts the API server, and joins both nodes. There is no Node object yet.
    fn join(setting: &Setting) -> anyhow::Result<Self> {
        let scene = Scene::build(setting)?;
        let controller = Controller::start(&scene.lab, &scene.cp, &setting.binaries)?;
        let cp = scene.node(setting, &controller, &scene.cp, "cp", ("", &[]))?;
        let directory = scene.lab.directory().join("kubernetes");
        let api = ApiServer::start(&scene.worker, &directory)?;
        let configuration = format!(
            "[kubernetes]\nkubeconfig = {:?}\ncni_dir = {:?}\n",
            api.kubeconfig,
            directory.join("cni")
        );
        let worker =
            scene.node(setting, &controller, &scene.worker, "worker", (&configuration, &[]))?;
        settled(&cp, &worker)?;
        Ok(Self { worker, _cp: cp, _controller: controller, api, scene })
    }
}

/// A VXLAN link as flannel creates it, for uplinks of 1,500 bytes.
fn cni_mtu(setting: &Setting, case: &Case) -> anyhow::Result<Outcome> {
    let machine = Machine::join(setting)?;
    let remote = "192.168.1.99".parse()?;
    let vxlan = Overlay { kind: OverlayKind::Vxlan, id: 1, remote, port: 8_472 };
    let added = change(&machine.scene.worker, |netlink| {
        netlink.add_overlay("flannel.1", vxlan)?;
        let index = netlink.link_index("flannel.1")?;
        netlink.set_mtu(index, 1_450)?;
        Ok(netlink.set_up(index, true)?)
    });
    if let Err(error) = added {
        return Ok(Outcome::NotShown(format!("cannot create a VXLAN link: {error:#}")));
    }
    machine.api.set_node(&machine.worker.overlay_v4()?.to_string());
    ask(case, &[View::new(&machine.worker, "cp")])
}

/// A scripted API server on the loopback of a host, with a thread of its own.
struct ApiServer {
    api: ScriptedApi,
    /// Kubeconfig of the node `worker`.
    kubeconfig: PathBuf,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl ApiServer {
    /// Starts the server, and writes the credentials of the node and the configuration of flannel into a new
    /// directory.
    fn start(host: &Host, directory: &Path) -> anyhow::Result<Self> {
        fs::create_dir(directory)?;
        let cni = directory.join("cni");
        fs::create_dir(&cni)?;
        fs::write(cni.join("10-flannel.conflist"), r#"{"plugins": [{"type": "flannel"}]}"#)?;
        let authority = ClusterCa::new("cluster")?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        // The socket belongs to the namespace in which it is created.
        let (runtime, api) = host.namespace().run(|| {
            let api = runtime.block_on(ScriptedApi::start(&authority))?;
            Ok((runtime, api))
        })?;
        let (ca, credentials) = (directory.join("ca.crt"), directory.join("kubelet.pem"));
        replace(&ca, authority.pem())?;
        replace(&credentials, &authority.issue_node("worker")?.both())?;
        let path = directory.join("kubelet.conf");
        replace(&path, &kubeconfig(&api.url, &ca, &credentials))?;
        let (stop, stopped) = oneshot::channel();
        let serve = move || {
            // It fails if the other end is gone, which ends the server too.
            let _ = runtime.block_on(stopped);
        };
        let thread = std::thread::Builder::new().name("api-server".to_owned()).spawn(serve);
        let thread = thread.context("cannot start the thread of the API server")?;
        Ok(Self { api, kubeconfig: path, stop: Some(stop), thread: Some(thread) })
    }

    /// Sets the Node object of the worker, with this address.
    fn set_node(&self, address: &str) {
        self.api.node("worker", address, &[PODS]);
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
