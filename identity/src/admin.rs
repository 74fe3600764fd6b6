//! What the service adds to its admin port: its own identity, the members of the trust streams, and
//! the orders that a rotation gives them. It answers to loopback only.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use serde::Serialize;
use steadfast_api::UnixTime;

use crate::certify::Certifier;
use crate::member::Member;
use crate::own::OwnSvid;
use crate::streams::Streams;

/// What the answers are made of.
pub struct Pages {
    /// Asked for the time and the profile.
    pub certifier: Arc<Certifier>,
    /// What the server shows.
    pub own: Arc<OwnSvid>,
    /// Given the orders.
    pub streams: Arc<Streams>,
}

/// `/members`.
#[derive(Serialize)]
struct MembersPage {
    /// When the last of those was seen who are not among them though they should be, because there
    /// were too many.
    forgotten: Option<UnixTime>,
    members: Vec<Member>,
}

impl Pages {
    /// Answers one request; `None`: there is no such page.
    pub fn answer(&self, request: &Request<Bytes>) -> Option<Response<String>> {
        let answer = match (request.method(), request.uri().path()) {
            (&Method::GET, "/identity.json") => Ok(json(&self.own.page())),
            (&Method::GET, "/members") => {
                let (forgotten, members) = (self.streams.forgotten(), self.streams.members());
                Ok(json(&MembersPage { forgotten, members }))
            }
            (&Method::POST, "/query") => self.query(parameter(request, "nonce")),
            (&Method::POST, "/renew") => self.renew(parameter(request, "window_s")),
            _ => return None,
        };
        Some(answer.unwrap_or_else(|wrong| response(StatusCode::BAD_REQUEST, TEXT, wrong)))
    }

    /// Nonces ascend, so one may be no greater than the time: else nothing would ascend from it.
    fn query(&self, nonce: &str) -> Result<Response<String>, String> {
        let newest = self.certifier.clock.now().as_millis().saturating_mul(1000);
        let wrong = |oldest: u64| {
            format!(
                "nonce {nonce:?}: expected a number from {oldest} to {newest}, as nonces ascend and \
                 are the time in microseconds at most\n"
            )
        };
        let parsed = nonce.parse().ok().filter(|nonce| (1..=newest).contains(nonce));
        let parsed = parsed.ok_or_else(|| wrong(1))?;
        self.streams.query(parsed).map_err(|newest| wrong(newest.saturating_add(1)))?;
        Ok(json(&serde_json::json!({ "nonce": parsed })))
    }

    /// A window longer than a life would pull nothing forward.
    fn renew(&self, window_s: &str) -> Result<Response<String>, String> {
        let longest = self.certifier.profile.svid_lifetime.as_secs();
        let parsed = window_s.parse().ok().filter(|window| (0..=longest).contains(window));
        let window = parsed.map(Duration::from_secs).ok_or_else(|| {
            format!(
                "window_s {window_s:?}: expected a number of seconds from 0 to {longest}, the life \
                 of an SVID\n"
            )
        })?;
        let id = self.streams.renew(self.certifier.clock.now(), window);
        Ok(json(&serde_json::json!({ "id": id })))
    }
}

/// Of the query of a request; empty if it is not there.
fn parameter<'a>(request: &'a Request<Bytes>, name: &str) -> &'a str {
    let pairs = request.uri().query().unwrap_or_default().split('&');
    let mut pairs = pairs.filter_map(|pair| pair.split_once('='));
    pairs.find(|(known, _)| *known == name).map_or("", |(_, value)| value)
}

fn json(value: &impl Serialize) -> Response<String> {
    // Strings and numbers alone: serialising them cannot fail.
    response(StatusCode::OK, JSON, serde_json::to_string(value).unwrap_or_default() + "\n")
}

fn response(status: StatusCode, content_type: &'static str, body: String) -> Response<String> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let content_type = header::HeaderValue::from_static(content_type);
    response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    response
}

const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";
