//! Keeps the API server's trust in this replica's certificate: looks at the
//! MutatingWebhookConfiguration again and again, puts right what is missing, and exchanges the
//! certificate long before it ends.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use json_patch::jsonptr::PointerBuf;
use json_patch::{AddOperation, Patch, PatchOperation, TestOperation};
use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use kube::api::PatchParams;
use kube::{Api, Client};
use rustls::sign::CertifiedKey;
use serde_json::json;
use steadfast_process::readiness::Component;
use steadfast_process::{Clock, ErrorChain};
use tokio::time::sleep;

use super::Names;
use super::certificate::{Serving, wanted_bundle};
use crate::Metrics;

/// Who keeps it.
pub(crate) struct Trusted {
    api: Api<MutatingWebhookConfiguration>,
    names: Names,
    clock: Arc<dyn Clock>,
    metrics: Metrics,
    serve: Box<dyn Fn(Arc<CertifiedKey>) + Send + Sync>,
    /// What is served.
    now: Serving,
    /// What will be, and since when the API server is told to trust it, by the boot clock.
    next: Option<(Serving, Option<Duration>)>,
    /// What was logged last.
    logged: Option<String>,
}

/// How things stand with the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// There is none: nobody calls.
    Absent,
    /// It trusts us.
    Trusts,
    /// It trusts us from now on.
    Mended,
}

impl Trusted {
    pub(super) fn new(
        client: Client,
        names: Names,
        first: Serving,
        clock: Arc<dyn Clock>,
        metrics: Metrics,
        serve: Box<dyn Fn(Arc<CertifiedKey>) + Send + Sync>,
    ) -> Self {
        let (api, now) = (Api::all(client), first);
        Self { api, names, clock, metrics, serve, now, next: None, logged: None }
    }

    /// Keeps it; `told` is ready once the API server may call.
    pub(crate) async fn keep(mut self, told: Component) -> Infallible {
        self.metrics.webhook_not_after(self.now.not_after);
        let mut told = Some(told);
        loop {
            self.exchange();
            let looked = self.look().await;
            let pause = match &looked {
                Ok(Look::Mended) => SETTLE_FIRST,
                Ok(_) => {
                    if let Some(told) = told.take() {
                        told.ready();
                    }
                    PAUSE
                }
                Err(why) => {
                    if let Some(told) = &told {
                        told.not_ready(why);
                    }
                    PAUSE_FAILED
                }
            };
            self.log(looked);
            sleep(pause).await;
        }
    }

    /// Makes the next certificate when it is time, and serves it when it is trusted.
    fn exchange(&mut self) {
        let (now, boot) = (self.clock.now(), self.clock.since_boot());
        if self.next.is_none() && now >= self.now.renew_at {
            match Serving::make(&self.names.host, &self.names.replica, now) {
                Ok(next) => self.next = Some((next, None)),
                Err(error) => tracing::error!("{}", ErrorChain(&error)),
            }
        }
        let settled = |told: &Option<Duration>| told.is_some_and(|told| boot >= told + SETTLE);
        if let Some((next, _)) = self.next.take_if(|(_, told)| settled(told)) {
            (self.serve)(Arc::clone(&next.key));
            self.metrics.webhook_not_after(next.not_after);
            tracing::info!(not_after = %next.not_after, "the webhook serves a new certificate");
            self.now = next;
        }
    }

    /// Looks at the configuration and puts it right.
    async fn look(&mut self) -> Result<Look, String> {
        let name = &self.names.configuration;
        let cannot = |what: &str, error: kube::Error| {
            format!(
                "the MutatingWebhookConfiguration {name} cannot be {what}: {}",
                ErrorChain(&error)
            )
        };
        let found = self.api.get_opt(name).await.map_err(|error| cannot("read", error))?;
        let Some(found) = found else { return Ok(Look::Absent) };
        let own: Vec<_> =
            [&self.now].into_iter().chain(self.next.as_ref().map(|(next, _)| next)).collect();
        let now = self.clock.now();
        let mut patch = Vec::new();
        for (index, webhook) in found.webhooks.iter().flatten().enumerate() {
            let trusted = webhook.client_config.ca_bundle.as_ref().map_or(&[][..], |ca| &ca.0);
            if let Some(wanted) = wanted_bundle(trusted, &self.names.replica, &own, now) {
                let index = index.to_string();
                let path = ["webhooks", &index, "clientConfig", "caBundle"];
                let value = json!(k8s_openapi::ByteString(wanted));
                let path = PointerBuf::from_tokens(path);
                patch.push(PatchOperation::Add(AddOperation { path, value }));
            }
        }
        let mended = !patch.is_empty();
        if mended {
            // Another replica may write at this moment.
            let path = PointerBuf::from_tokens(["metadata", "resourceVersion"]);
            let value = json!(found.metadata.resource_version);
            patch.insert(0, PatchOperation::Test(TestOperation { path, value }));
            let patch = kube::api::Patch::Json::<()>(Patch(patch));
            let params = PatchParams::default();
            self.api
                .patch(name, &params, &patch)
                .await
                .map_err(|error| cannot("written", error))?;
        }
        let boot = self.clock.since_boot();
        if let Some((_, told)) = &mut self.next {
            told.get_or_insert(boot);
        }
        Ok(if mended { Look::Mended } else { Look::Trusts })
    }

    /// Once for each change.
    fn log(&mut self, looked: Result<Look, String>) {
        let name = &self.names.configuration;
        let line = match looked {
            Ok(Look::Absent) => Some(format!(
                "there is no MutatingWebhookConfiguration {name}: no pod is meshed as it is created"
            )),
            Ok(Look::Mended) => {
                self.logged = None;
                return tracing::info!("the API server is told to trust this replica's webhook");
            }
            Ok(Look::Trusts) => None,
            Err(why) => Some(why),
        };
        if let Some(line) = line.as_ref().filter(|line| self.logged.as_ref() != Some(line)) {
            tracing::warn!("{line}");
        }
        self.logged = line;
    }
}

/// How often the configuration is looked at.
const PAUSE: Duration = Duration::from_secs(10);
/// After a failure: mostly that another replica wrote at the same moment.
const PAUSE_FAILED: Duration = Duration::from_secs(1);
/// How long an API server may take to see that a new replica is to be trusted.
const SETTLE_FIRST: Duration = Duration::from_secs(1);
/// The same where nothing is in a hurry: the next certificate.
const SETTLE: Duration = Duration::from_secs(60);
