//! `blockdev-create`: makes an image, with the driver's own function for that.
//!
//! A protocol makes a file; a format fills a node, which is named or defined in the options and goes again
//! with the job. The driver does its work in one go: such a job neither pauses nor stops halfway, and the
//! end of one that was cancelled is that the image is there and nobody wants it.

use std::cell::{Cell, RefCell};

use dolmen_graph::{
    ChildEdge, ClaimScope, Class, CreateCx, Creation, Draft, ImageMaker, NewImage, NodeOpener, OpClaim,
    OpenPolicy, Registry, check_room,
};
use dolmen_rt::LocalFuture;
use dolmen_types::{
    Actions, ChildRole, Claim, Error, ErrorKind, NodeName, OpId, OptionSpec, OptionType, Options, Result,
    Value,
};

use crate::stream::known;
use crate::{BeginCx, Details, Ending, JobCx, JobKind, SettleCx, Work, nothing_to_change};

/// What opens files by name, once the job runs.
type Names = (Registry, OpenPolicy, fn(Registry, &str) -> Result<Options>);

/// What is to be made, once the job has begun.
enum Plan {
    /// A file.
    File(NewImage, Names),
    /// An image in the node that the job has an edge to.
    Image(Box<dyn Creation>),
}

/// The work of a create job.
pub struct Create {
    driver: String,
    /// What the driver gets, without `driver` and `file`.
    options: RefCell<Options>,
    /// The node to be filled: its name, or its definition.
    file: RefCell<Option<Value>>,
    plan: Cell<Option<Plan>>,
    /// It has failed before it began.
    failed: RefCell<Option<Error>>,
}

impl std::fmt::Debug for Create {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Create({}, {:?})", self.driver, self.options)
    }
}

impl Create {
    /// Reads the options of `blockdev-create`.
    ///
    /// # Errors
    /// `InvalidInput` when no driver is named.
    pub fn from_options(o: &mut Options) -> Result<Create> {
        let mut options = o.take_map("options")?.unwrap_or_default();
        let driver = options.require_str("driver")?;
        let file = options.take("file");
        Ok(Create {
            driver,
            options: RefCell::new(options),
            file: RefCell::new(file),
            plan: Cell::new(None),
            failed: RefCell::new(None),
        })
    }

    /// A work that fails with `error` when it runs: clients of this command expect a job that fails where
    /// the file is not there or can't be used.
    pub fn failing(error: Error) -> Create {
        Create {
            driver: String::new(),
            options: RefCell::default(),
            file: RefCell::default(),
            plan: Cell::new(None),
            failed: RefCell::new(Some(error)),
        }
    }

    /// Finds out all that could be wrong, with nothing touched.
    async fn begin(&self, cx: BeginCx<'_>) -> Result<()> {
        if self.failed.borrow().is_some() {
            return Ok(());
        }
        let kind = cx.opener.registry.find(&self.driver)?;
        let file = self.file.borrow().clone();
        let options = self.options.borrow().clone();
        // What has no way to make images, or (raw) nothing of its own to be made.
        let parse = kind.create.ok_or_else(unsupported)?;
        let Some(file) = file else {
            if kind.class != Class::Protocol {
                return Err(unsupported());
            }
            let mut node = Options::new().with("driver", kind.name);
            if let Some(name) = options.get("filename") {
                node.set("filename", name.clone());
            }
            let image = NewImage { file: node, format: None, options, beneath: None };
            ImageMaker::check(cx.opener, image.clone()).await?;
            let names = (cx.opener.registry, cx.opener.policy, cx.opener.names);
            self.plan.set(Some(Plan::File(image, names)));
            return Ok(());
        };
        let creation = parse(options)?;
        let node: NodeName = match file {
            Value::Str(name) => known(cx.draft, &name, &name)?,
            definition => {
                let options = Options::from_value(definition)?;
                cx.opener.open(cx.draft, options, false).await?
            }
        };
        let built = cx.draft.built_node(&node)?;
        if is_fixed(&built) {
            check_room(built.size(), creation.room())?;
        }
        if let Some(to) = creation.backing() {
            cx.opener.check_backing(&built, to).await?;
        }
        drop(built);
        self.plan.set(Some(Plan::Image(creation)));
        use Actions as A;
        cx.draft.add_user(cx.op, &node, Claim { needs: A::D | A::V | A::S, allows: A::EVERY })?;
        cx.draft.add_claim(OpClaim {
            op: cx.op.clone(),
            node,
            claim: Claim { needs: A::NONE, allows: A::EVERY - A::V - A::M - A::S },
            scope: ClaimScope::Node,
            why: "makes an image in it".into(),
            pins: true,
        })
    }

    async fn create(&self, cx: &JobCx) -> Result<()> {
        if let Some(e) = self.failed.take() {
            return Err(e);
        }
        match self.plan.take().ok_or_else(unsupported)? {
            Plan::File(image, (registry, policy, names)) => {
                let opener = NodeOpener { registry, policy, names, rt: cx.rt() };
                dolmen_graph::create_image(&opener, image).await
            }
            Plan::Image(creation) => {
                let token = cx.edge(0).begin().await?;
                let edge = ChildEdge {
                    name: "file",
                    role: ChildRole::Metadata,
                    node: token.node().clone(),
                    claim: cx.edge(0).claim(),
                };
                let fixed = is_fixed(&edge.node);
                creation.make(CreateCx { file: Some(&edge), fixed, rt: cx.rt() }).await
            }
        }
    }
}

/// Whether a node keeps its length: a device, or the export of a server.
fn is_fixed(node: &dolmen_graph::Node) -> bool {
    let kind = node.driver.kind();
    kind.class == Class::Protocol && kind.create.is_none()
}

fn unsupported() -> Error {
    Error::new(ErrorKind::Unsupported, "Driver does not support blockdev-create")
}

impl Work for Create {
    fn kind(&self) -> &'static JobKind {
        &CREATE
    }

    fn detail(&self) -> String {
        format!("creation of a '{}' image", self.driver)
    }

    fn begin<'a>(&'a self, cx: BeginCx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.begin(cx))
    }

    fn run<'a>(&'a self, cx: &'a JobCx) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            cx.set_remaining(1);
            let made = self.create(cx).await;
            cx.progress_add(1);
            made
        })
    }

    fn settle<'a>(&'a self, _: SettleCx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn end(&self, _: &OpId, _: &mut Draft, _: Ending) -> Result<()> {
        Ok(())
    }

    fn may_complete(&self) -> Result<()> {
        Ok(())
    }

    fn change(&self, _: Options) -> Result<crate::Effect<'_>> {
        Err(nothing_to_change())
    }

    fn details(&self) -> Details {
        Vec::new()
    }
}

/// The kind.
pub(crate) static CREATE: JobKind = JobKind {
    name: "create",
    command: "blockdev-create",
    help: "Makes an image; the job has to be dismissed.",
    is_block_job: false,
    is_completed: false,
    in_transactions: false,
    options: &[&[
        OptionSpec::required("job-id", OptionType::Str, "name of the job"),
        OptionSpec::required("options", OptionType::NewImage, "what is made: a driver, and its options"),
    ]],
    change: &[],
    details: &[],
    parse: |o| Ok(Box::new(Create::from_options(o)?)),
    failing: Some(|error| Box::new(Create::failing(error))),
};
