//! What the sidecar adds to the admin port: answers to loopback only, changes by POST or PUT.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use serde::Serialize;
use steadfast_api::DnsIdentity;
use steadfast_identity_client::{Status, TlsContext};
use steadfast_process::log;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// What the answers are made of.
pub struct Pages {
    /// The log that is running.
    pub log: log::Handle,
    /// Ends the process as SIGTERM does.
    pub shutdown: CancellationToken,
    /// The configuration's variables.
    pub env: BTreeMap<&'static str, String>,
    /// The workload's name.
    pub local_name: DnsIdentity,
    /// What is known of its identity.
    pub status: watch::Receiver<Status>,
    /// What TLS uses.
    pub contexts: watch::Receiver<Arc<TlsContext>>,
}

/// `/identity.json`.
#[derive(Serialize)]
struct IdentityPage<'a> {
    /// The name it was configured with.
    local_name: String,
    /// The DNS SANs of the SVID in use.
    dns_names: &'a [String],
    #[serde(flatten)]
    status: &'a Status,
}

impl Pages {
    /// Answers one request; `None`: there is no such page.
    pub fn answer(&self, request: &Request<Bytes>) -> Option<Response<String>> {
        let (method, path) = (request.method(), request.uri().path());
        Some(match (path, method) {
            ("/env.json", &Method::GET) => json(&self.env),
            ("/identity.json", &Method::GET) => self.identity(),
            ("/proxy-log-level", &Method::GET) => text(StatusCode::OK, self.log.filter() + "\n"),
            ("/proxy-log-level", &Method::POST | &Method::PUT) => self.set_filter(request.body()),
            ("/shutdown", &Method::POST) => {
                self.shutdown.cancel();
                text(StatusCode::OK, "shutting down\n".to_owned())
            }
            ("/env.json" | "/identity.json", _) => wrong_method("GET"),
            ("/proxy-log-level", _) => wrong_method("GET, POST, PUT"),
            ("/shutdown", _) => wrong_method("POST"),
            _ => return None,
        })
    }

    fn identity(&self) -> Response<String> {
        let context = self.contexts.borrow().clone();
        let dns_names = context.svid.as_ref().map_or(&[][..], |svid| &svid.facts().dns_names);
        let status = self.status.borrow().clone();
        let local_name = self.local_name.to_string();
        json(&IdentityPage { local_name, dns_names, status: &status })
    }

    fn set_filter(&self, body: &[u8]) -> Response<String> {
        let Ok(filter) = std::str::from_utf8(body) else {
            return text(StatusCode::BAD_REQUEST, "the filter is not UTF-8\n".to_owned());
        };
        match self.log.set_filter(filter.trim()) {
            Ok(()) => {
                tracing::info!(filter = filter.trim(), "the log's filter was changed");
                text(StatusCode::OK, self.log.filter() + "\n")
            }
            Err(error) => text(StatusCode::BAD_REQUEST, error + "\n"),
        }
    }
}

fn json(value: &impl Serialize) -> Response<String> {
    // Strings and numbers alone: serialising them cannot fail.
    let body = serde_json::to_string_pretty(value).unwrap_or_default() + "\n";
    let mut response = text(StatusCode::OK, body);
    let json = header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}

fn text(status: StatusCode, body: String) -> Response<String> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
}

fn wrong_method(allowed: &'static str) -> Response<String> {
    let mut response =
        text(StatusCode::METHOD_NOT_ALLOWED, format!("this takes {allowed}, nothing else\n"));
    response.headers_mut().insert(header::ALLOW, header::HeaderValue::from_static(allowed));
    response
}
