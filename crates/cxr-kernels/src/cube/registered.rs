//! One of our operations as one operation of a fusion stream.

use std::fmt;
use std::sync::Arc;

use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, Shape};
use burn_fusion::stream::{Operation, OperationStreams};
use burn_fusion::{Fusion, FusionBackend};
use burn_ir::{CustomOpIr, HandleContainer, OperationIr, TensorIr};

/// Has the backend under the fusion layer compute `run(inputs)` when the stream comes to it.
///
/// `name` tells operations apart that differ in more than the shapes of their inputs: fusion plans are kept by it.
pub(super) fn register<B: FusionBackend>(
    name: String,
    inputs: Vec<FloatTensor<Fusion<B>>>,
    shape: Shape,
    dtype: DType,
    run: impl Fn(Vec<FloatTensor<B>>) -> FloatTensor<B> + Send + Sync + 'static,
) -> FloatTensor<Fusion<B>> {
    let streams = OperationStreams::with_inputs(&inputs);
    let client = inputs[0].client.clone();
    let output = TensorIr::uninit(client.create_empty_handle(), shape, dtype);
    let inputs = inputs.into_iter().map(|tensor| tensor.into_ir()).collect();
    let ir = CustomOpIr { id: name, inputs, outputs: vec![output] };
    let operation = Registered::<B> { ir: ir.clone(), run: Arc::new(run) };
    let mut outputs = client.register(streams, OperationIr::Custom(ir), operation);
    outputs.remove(0)
}

type Run<B> = Arc<dyn Fn(Vec<FloatTensor<B>>) -> FloatTensor<B> + Send + Sync>;

struct Registered<B: FusionBackend> {
    ir: CustomOpIr,
    run: Run<B>,
}

impl<B: FusionBackend> fmt::Debug for Registered<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registered").field("ir", &self.ir).finish_non_exhaustive()
    }
}

impl<B: FusionBackend> Operation<B::FusionRuntime> for Registered<B> {
    fn execute(&self, handles: &mut HandleContainer<B::Handle>) {
        let inputs = self.ir.inputs.iter().map(|tensor| handles.get_float_tensor::<B>(tensor)).collect();
        let output = (self.run)(inputs);
        handles.register_float_tensor::<B>(&self.ir.outputs[0].id, output);
    }
}
