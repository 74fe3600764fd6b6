//! What speaks HTTP: gRPC by its paths, `GET /bundle` and `GET /jwks` beside it.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use linkerd2_proxy_api::identity::identity_server::IdentityServer;
use steadfast_api::Code;
use steadfast_api_grpc::fleet_server::FleetServer;
use steadfast_api_grpc::trust_server::TrustServer;
use steadfast_platform::Store;
use steadfast_platform::store::TOKEN_JWKS_KEY;
use steadfast_process::Clock;
use tonic::Status;
use tonic::body::Body;
use tower::Service as _;

use crate::refusal::Refusal;
use crate::replica::Replica;
use crate::service::Service;
use crate::streams::MESSAGE_BYTES_MAX;

/// Answers every request of a connection. Cheap to clone.
#[derive(Clone)]
pub struct Front {
    identity: IdentityServer<Service>,
    trust: TrustServer<Service>,
    fleet: FleetServer<Service>,
    pages: Arc<Pages>,
}

/// What is no gRPC.
struct Pages {
    replica: Arc<Replica>,
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    /// The public keys of the token issuer, and when they were read on the boot clock.
    jwks: Mutex<Option<(Bytes, Duration)>>,
}

impl Front {
    /// In front of these services.
    pub fn new(service: Service, store: Arc<dyn Store>) -> Self {
        let certifier = &service.certifier;
        let (replica, clock) = (Arc::clone(&certifier.replica), Arc::clone(&certifier.clock));
        let pages = Arc::new(Pages { replica, store, clock, jwks: Mutex::default() });
        Self {
            identity: IdentityServer::new(service.clone())
                .max_decoding_message_size(MESSAGE_BYTES_MAX),
            trust: TrustServer::new(service.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX),
            fleet: FleetServer::new(service).max_decoding_message_size(MESSAGE_BYTES_MAX),
            pages,
        }
    }

    /// Answers one request.
    ///
    /// # Errors
    /// None: what goes wrong is an answer.
    pub async fn answer(&self, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
        let (method, uri) = (request.method().clone(), request.uri().clone());
        let path = uri.path();
        let answer = async {
            if path.starts_with(TRUST_PREFIX) {
                self.trust.clone().call(request).await
            } else if path.starts_with(FLEET_PREFIX) {
                self.fleet.clone().call(request).await
            } else if path.starts_with(IDENTITY_PREFIX) {
                self.identity.clone().call(request).await
            } else {
                Ok(self.pages.answer(&method, path).await)
            }
        };
        match tokio::time::timeout(REQUEST_TIMEOUT, answer).await {
            Ok(answer) => answer,
            // Every wait in here has its own, shorter deadline: this one is for a body that never
            // ends.
            Err(_) => Ok(Status::deadline_exceeded("the request took too long").into_http()),
        }
    }
}

impl Pages {
    async fn answer(&self, method: &Method, path: &str) -> Response<Body> {
        let found = match path {
            "/bundle" => self.bundle(),
            "/jwks" => self.jwks().await,
            _ => {
                let text = "nothing here: gRPC, GET /bundle and GET /jwks\n";
                return page(StatusCode::NOT_FOUND, TEXT, text.into());
            }
        };
        if *method != Method::GET && *method != Method::HEAD {
            return page(StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET\n".into());
        }
        match found {
            Ok(body) if *method == Method::HEAD => page(StatusCode::OK, JSON, drop_body(&body)),
            Ok(body) => page(StatusCode::OK, JSON, body),
            Err(refusal) => {
                let text = format!("{refusal}\n");
                page(StatusCode::SERVICE_UNAVAILABLE, TEXT, text.into())
            }
        }
    }

    /// The SPIFFE bundle, under a confirmed view only.
    fn bundle(&self) -> Result<Bytes, Refusal> {
        Ok(Bytes::from(self.replica.current()?.jwks.clone()))
    }

    /// The token issuer's public keys, as the store has them.
    async fn jwks(&self) -> Result<Bytes, Refusal> {
        let now = self.clock.since_boot();
        let known = self.jwks.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((jwks, read)) = known
            && now.saturating_sub(read) < JWKS_AGE_MAX
        {
            return Ok(jwks);
        }
        let refuse = |what: String| Refusal::new(Code::STORE_UNAVAILABLE, what);
        let read = tokio::time::timeout(STORE_TIMEOUT, self.store.get(TOKEN_JWKS_KEY)).await;
        let entry = read
            .map_err(|_| refuse(format!("the store has not answered in {STORE_TIMEOUT:?}")))?
            .map_err(|error| refuse(error.to_string()))?
            .ok_or_else(|| refuse("the token issuer has published no keys yet".to_owned()))?;
        let mut known = self.jwks.lock().unwrap_or_else(PoisonError::into_inner);
        *known = Some((entry.value.clone(), now));
        Ok(entry.value)
    }
}

/// HEAD answers as GET does, without the body.
fn drop_body(_body: &Bytes) -> Bytes {
    Bytes::new()
}

fn page(status: StatusCode, content_type: &'static str, body: Bytes) -> Response<Body> {
    let mut response = Response::new(Body::new(Full::new(body)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

const TRUST_PREFIX: &str = "/steadfast.trust.v1.Trust/";
const FLEET_PREFIX: &str = "/steadfast.trust.v1.Fleet/";
const IDENTITY_PREFIX: &str = "/io.linkerd.proxy.identity.Identity/";
const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";
const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);
const STORE_TIMEOUT: Duration = Duration::from_secs(3);
const JWKS_AGE_MAX: Duration = Duration::from_secs(5);
