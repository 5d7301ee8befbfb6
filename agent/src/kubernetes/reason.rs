//! Reasons and problems of this machine's Node, for the operator.

use towline_proto::codes;
use towline_proto::id::MeshId;

/// Reason why the Node is not available.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// There is no kubeconfig of a kubelet. The text tells where it was configured, if it was.
    #[error("no kubelet credentials yet{0}")]
    NoCredentials(String),
    /// The kubeconfig cannot be used.
    #[error("{0}")]
    Credentials(String),
    /// The API server did not name the user of the credentials.
    #[error(transparent)]
    User(ApiError),
    /// The API server has no such Node.
    #[error("the Node `{0}` is not registered")]
    NotRegistered(String),
    /// The API server sent another Node than the requested one.
    #[error("invalid response from the API server: it sent another Node, `{0}`")]
    OtherNode(String),
    /// The watch ended without an error.
    #[error("the watch ended")]
    WatchEnded,
    /// The API server does not answer, or refused the watch.
    #[error("{server}: {error}")]
    Api {
        /// Address of the API server.
        server: String,
        /// Error of the request.
        error: ApiError,
    },
}

codes! {
    Unavailable {
        NoCredentials => "kubelet-credentials-missing",
        Credentials => "kubelet-credentials-unusable",
        User(ApiError),
        NotRegistered => "node-not-registered",
        OtherNode => "api-server-response-invalid",
        WatchEnded => "api-server-watch-ended",
        Api { error: ApiError },
    }
}

#[cfg(feature = "kubernetes")]
impl Unavailable {
    /// Returns whether this is the state of a machine that has not joined its cluster yet. Other reasons
    /// are errors of the API server or of the credentials.
    pub(super) fn is_expected(&self) -> bool {
        matches!(self, Self::NoCredentials(_) | Self::NotRegistered(_))
    }
}

/// Error of a request to the API server.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// Status 401.
    #[error("the API server does not know these credentials (401): use those of this cluster")]
    Unauthorized,
    /// Status 403.
    #[error(
        "the API server refused these credentials (403): use the kubelet's own kubeconfig of this \
         cluster"
    )]
    Forbidden,
    /// Another status.
    #[error("{0}")]
    Status(String),
    /// The certificate of the API server is of another CA.
    #[error("the API server is of another cluster than the kubeconfig: {0}")]
    OtherCluster(String),
    /// A certificate is not valid at this machine's time.
    #[error("a certificate is not valid now: check this machine's clock: {0}")]
    Clock(String),
    /// The API server cannot be reached.
    #[error("cannot reach the API server: {0}")]
    Unreachable(String),
    /// The response cannot be used.
    #[error("{0}")]
    Watch(String),
}

codes! {
    ApiError {
        Unauthorized => "api-server-unauthorized",
        Forbidden => "api-server-forbidden",
        Status => "api-server-error",
        OtherCluster => "api-server-of-other-cluster",
        Clock => "api-server-certificate-not-valid",
        Unreachable => "api-server-unreachable",
        Watch => "api-server-watch-failed",
    }
}

/// Reason why it is not known how pod traffic is routed. What was announced before stays.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CniUnknown {
    /// There is no CNI configuration.
    #[error("no CNI is configured yet")]
    NotConfigured,
    /// Flannel has not written its state.
    #[error("flannel has not started yet")]
    NotStarted,
    /// The plugin is not known.
    #[error(
        "the CNI `{plugin}` is not known: set [kubernetes] announce_pods to `always` if it routes pods \
         natively, or to `never`"
    )]
    Plugin {
        /// Name of the plugin.
        plugin: String,
    },
    /// This node has no pod network.
    #[error("`{plugin}` has no pod network on this node yet")]
    NoPodNetwork {
        /// Name of the plugin.
        plugin: String,
    },
}

codes! {
    CniUnknown {
        NotConfigured => "cni-not-configured",
        NotStarted => "cni-not-started",
        Plugin => "cni-not-known",
        NoPodNetwork => "cni-without-pod-network",
    }
}

/// Problem with this machine's Node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NodeProblem {
    /// A pod network of the Node cannot be parsed.
    #[error("the Node's pod network `{network}` is invalid")]
    InvalidPodNetwork {
        /// Text of the Node.
        network: String,
    },
    /// No address of the Node is one of this machine.
    #[error(
        "the kubeconfig is of node `{node}`, whose address {addresses} is not on this machine: nothing \
         of it is announced: use this machine's kubeconfig"
    )]
    OtherMachine {
        /// Name of the Node.
        node: String,
        /// Its addresses.
        addresses: String,
    },
    /// The Node says that its pod network belongs to another mesh.
    #[error(
        "the Node's label {label} names mesh {other}, and this machine joined mesh {own}: no pod network is \
         announced: join that mesh, or remove the label if the cluster moved to this one"
    )]
    OtherMesh {
        /// Name of the label.
        label: &'static str,
        /// Value of the label.
        other: String,
        /// Id of the mesh that this machine joined.
        own: MeshId,
    },
    /// Packets of pods may be larger than the mesh's link.
    #[error(
        "the CNI's link has an MTU of {now}, too large for the mesh's link: set {mtu} in its \
         configuration"
    )]
    CniMtu {
        /// MTU of the CNI's link.
        now: u32,
        /// Largest MTU that fits.
        mtu: u32,
    },
    /// The next start would use older facts.
    #[error("cannot store the facts from Kubernetes: {reason}: the next start uses older ones")]
    NotStored {
        /// Error of the operating system.
        reason: String,
    },
}

codes! {
    NodeProblem {
        InvalidPodNetwork => "pod-network-invalid",
        OtherMachine => "kubeconfig-of-other-node",
        OtherMesh => "pod-network-of-other-mesh",
        CniMtu => "cni-mtu-too-large",
        NotStored => "kubernetes-facts-not-stored",
    }
}
