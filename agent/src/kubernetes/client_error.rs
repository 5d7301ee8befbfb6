//! Errors of the API client, as one line for the operator.

/// Converts an error of the client to one line that names the remedy.
pub(super) fn status_message(error: &kube::Error) -> String {
    if let kube::Error::Api(status) = error {
        return match status.code {
            401 => {
                "the API server does not know these credentials (401): use those of this cluster"
                    .into()
            }
            403 => {
                "the API server refused these credentials (403): use the kubelet's own kubeconfig \
                 of this cluster"
                    .into()
            }
            code => one_line(&format!("the API server answered {code}: {}", status.message)),
        };
    }
    let mut chain = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(next) = cause {
        let text = next.to_string();
        if !chain.contains(&text) {
            chain = format!("{chain}: {text}");
        }
        cause = next.source();
    }
    let hint = if chain.contains("UnknownIssuer") || chain.contains("BadSignature") {
        "the API server is of another cluster than the kubeconfig: "
    } else if chain.contains("not valid yet") || chain.contains("expired") {
        "a certificate is not valid now: check this machine's clock: "
    } else {
        "cannot reach the API server: "
    };
    one_line(&format!("{hint}{chain}"))
}

/// Replaces control characters and limits the length, so that the text is safe to print.
pub(super) fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(400).collect()
}
