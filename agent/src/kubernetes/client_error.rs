//! Errors of the API client, for the operator.

use towline_service::output;

use super::ApiError;

/// Converts an error of the client to a reason that names the remedy.
pub(super) fn api_error(error: &kube::Error) -> ApiError {
    if let kube::Error::Api(status) = error {
        return match status.code {
            401 => ApiError::Unauthorized,
            403 => ApiError::Forbidden,
            code => ApiError::Status(one_line(&format!(
                "the API server answered {code}: {}",
                status.message
            ))),
        };
    }
    let chain = output::error_line(error);
    let line = one_line(&chain);
    if chain.contains("UnknownIssuer") || chain.contains("BadSignature") {
        ApiError::OtherCluster(line)
    } else if chain.contains("not valid yet") || chain.contains("expired") {
        ApiError::Clock(line)
    } else {
        ApiError::Unreachable(line)
    }
}

/// Replaces control characters and limits the length, so that the text is safe to print.
pub(super) fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(400).collect()
}
